"""A bundle: remoe-edge with its runtime and all of its Python packages in one tarball, ready to run on another machine.

`remoe-edge/` in it holds ``bin/remoe-edge`` (starts it from where it lies), ``site/`` (Python packages), ``runtime/``,
``wheels/`` (for those who want an environment of their own), ``bundle.json`` and ``sbom.cdx.json``.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, scratch_folder
from remoe_edge.jetson.artefacts import machine_of
from remoe_edge.jetson.package import write_package
from remoe_edge.jetson.pins import python_wheels, recipes_dir
from remoe_edge.jetson.sbom import write_sbom
from remoe_edge.jetson.wheels import fetch_wheels, install_into
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.build import Runtime

TOP = "remoe-edge"


@dataclass(frozen=True)
class Bundle:
    """What a bundle is for, as its ``bundle.json`` says.

    Attributes
    ----------
    machine
        As ``uname -m`` says it: "aarch64".
    python
        Its packages are for this Python ("3.12").
    cuda
        Whether the runtime has the CUDA backend.
    unpacked_bytes
        What it takes on a disk.
    """

    remoe_edge: str
    runtime: str
    machine: str
    python: str
    cuda: bool
    unpacked_bytes: int


def write_bundle(
    runtime: Runtime, output: Path, *, python: str, force: bool = False, report: Report = silent
) -> Bundle:
    """Write the bundle of a runtime to ``output`` (.tar.gz), for a Python such as "3.12".

    Raises RemoeError if a package cannot be fetched for that Python, or if ``output`` may not be written.
    """
    machine = machine_of(runtime.lib_dir / "libllama.so")
    with atomic_output(output, force=force) as temporary, scratch_folder("remoe-edge-bundle-") as folder:
        top = folder / TOP
        for name in ("bin", "wheels"):
            (top / name).mkdir(parents=True)
        own = write_package(top / "wheels")
        bindings = Path(shutil.copy2(runtime.wheel, top / "wheels"))
        dependencies = fetch_wheels(python_wheels(), python, machine, report)
        report("Putting the bundle together", None)
        install_into(top / "site", [*dependencies, own, bindings], python, machine)
        # Programs of the packages: they name this machine's Python.
        shutil.rmtree(top / "site" / "bin", ignore_errors=True)
        for name in ("remoe-edge", "main.py"):
            shutil.copyfile(recipes_dir() / "bundle" / name, top / "bin" / name)
        (top / "bin" / "remoe-edge").chmod(0o755)
        (top / "PYTHON").write_text(f"{python}\n")
        shutil.copytree(
            runtime.root,
            top / "runtime" / runtime.key,
            ignore=lambda at, _: ["wheel"] if Path(at) == runtime.root else [],
        )
        write_sbom(top / "site", runtime.manifest, top / "sbom.cdx.json")
        size = sum(path.stat().st_size for path in top.rglob("*") if path.is_file())
        bundle = Bundle(__version__, runtime.key, machine, python, runtime.manifest.cuda, size)
        (top / "bundle.json").write_text(json.dumps(asdict(bundle), indent=2) + "\n")
        report("Packing", None)
        with temporary.open("wb") as file:
            _pack(top, file)
    return bundle


def read_bundle(path: Path) -> Bundle:
    """What a bundle is for. Raises RemoeError if the file is not one."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            # The first member, so that nothing else has to be unpacked.
            member = archive.next()
            file = archive.extractfile(member) if member and member.name == f"{TOP}/bundle.json" else None
            if file is None:
                raise RemoeError(
                    f"{path} is not a bundle of remoe-edge; make one with: remoe-edge build --target jetson"
                )
            content: dict[str, Any] = json.loads(file.read())
            return Bundle(**content)
    except (tarfile.TarError, EOFError, OSError, ValueError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise RemoeError(f"{path} is not a bundle of remoe-edge: {error}") from error


def _pack(top: Path, file: IO[bytes]) -> None:
    """Equal contents make equal tarballs: names are sorted, owners and times left out."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = 0
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    paths = sorted(path for path in top.rglob("*") if path.name != "__pycache__")
    paths.sort(key=lambda path: path != top / "bundle.json")
    with (
        gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for path in paths:
            archive.add(path, f"{TOP}/{path.relative_to(top).as_posix()}", recursive=False, filter=plain)
