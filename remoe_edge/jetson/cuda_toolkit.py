"""A CUDA toolkit that runs on x86-64 and compiles for a Jetson's aarch64, put together from NVIDIA's wheels on PyPI.

CUDA 13.2, for JetPack 7.2: of CUDA 12 the wheels hold no nvcc. The compilers come from the x86-64 wheels, headers and
libraries from the aarch64 ones. The driver library is on every device and in no wheel: a stub stands in when linking.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import zipfile
from dataclasses import asdict
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir, scratch_folder
from remoe_edge.jetson.cross import PREFIX
from remoe_edge.jetson.pins import ARCHITECTURE, cuda_wheels
from remoe_edge.jetson.wheels import fetch_wheels
from remoe_edge.progress import Report, silent

_INSIDE = "nvidia/cu13/"
TOOLKIT_PYTHON = "3.12"
"""NVIDIA's wheels are for every Python; pip wants one named."""
_LINKED = ("libcudart", "libcublas", "libcublasLt")
_DRIVER = (
    *("cuInit", "cuGetErrorString", "cuGetErrorName", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount"),
    *("cuMemGetAllocationGranularity", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemUnmap", "cuMemAddressReserve"),
    *("cuMemAddressFree", "cuMemSetAccess", "cuCtxGetCurrent", "cuMemGetInfo_v2"),
)
"""What ggml calls of the driver."""
_LAYOUT = 1


def cuda_toolkit(report: Report = silent) -> Path:
    """The toolkit in the cache folder, made if it is not there. Raises RemoeError if that is not possible here."""
    pins = [cuda_wheels("host"), cuda_wheels("target")]
    identity = json.dumps([_LAYOUT, _DRIVER, [[asdict(wheel) for wheel in each] for each in pins]])
    target = cache_dir() / "cuda" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(".assemble-", target.parent) as temporary:
            assemble(temporary / "cuda", report)
            try:
                (temporary / "cuda").rename(target)
            except OSError:
                # Another process was quicker, and made the same.
                if not target.exists():
                    raise
    return target


def assemble(folder: Path, report: Report = silent) -> None:
    """Make the toolkit in a new folder; 890 MB there and 630 MB of wheels in the cache folder, most of it cuBLAS."""
    if platform.machine() != "x86_64":
        raise RemoeError(f"NVIDIA's compilers in the wheels run on x86-64, this machine is {platform.machine()}")
    if shutil.which(f"{PREFIX}gcc") is None:
        raise RemoeError(f"no {PREFIX}gcc found; on Debian and Ubuntu: sudo apt install g++-aarch64-linux-gnu")
    host = fetch_wheels(cuda_wheels("host"), TOOLKIT_PYTHON, "x86_64", report)
    target = fetch_wheels(cuda_wheels("target"), TOOLKIT_PYTHON, ARCHITECTURE, report)
    report("Putting the CUDA toolkit together", None)
    folder.mkdir(parents=True)
    for wheel in host:
        _unzip(wheel, folder, ("bin/", "nvvm/", "include/"))
    # Last, so that the target's headers replace any of the same name.
    for wheel in target:
        _unzip(wheel, folder, ("include/", "lib/"))
    for programs in (folder / "bin", folder / "nvvm" / "bin"):
        for path in programs.iterdir():
            if path.is_file():
                path.chmod(0o755)
    for name in _LINKED:
        for path in (folder / "lib").glob(f"{name}.so.*"):
            (folder / "lib" / f"{name}.so").symlink_to(path.name)
    _stub(folder / "lib" / "stubs")
    # nvcc and CMake look for the target's files under these names.
    (folder / "lib64").symlink_to("lib")
    (folder / "targets").mkdir()
    for name in ("sbsa-linux", "aarch64-linux"):
        (folder / "targets" / name).symlink_to("..")


def _unzip(wheel: Path, folder: Path, wanted: tuple[str, ...]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            inside = member.filename.removeprefix(_INSIDE)
            if member.is_dir() or inside == member.filename or not inside.startswith(wanted):
                continue
            if ".." in Path(inside).parts:
                raise RemoeError(f"{wheel}: refusing to unpack {member.filename!r}, which leaves the folder")
            path = folder / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as output:
                shutil.copyfileobj(source, output, 1 << 20)


def _stub(folder: Path) -> None:
    """A libcuda.so.1 to link to, whose functions say CUDA_ERROR_UNKNOWN."""
    folder.mkdir()
    source = "".join(f"int {name}(void) {{ return 999; }}\n" for name in _DRIVER)
    command = [
        f"{PREFIX}gcc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-x",
        "c",
        "-",
        "-o",
        f"{folder}/libcuda.so",
    ]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode != 0:
        raise RemoeError(f"the stub of libcuda does not compile: {result.stderr.strip()}")
    # ld finds it under this name when it resolves what libggml-cuda.so needs.
    (folder / "libcuda.so.1").symlink_to("libcuda.so")
