"""llama-cpp-python around our libraries: the wheel, its installation, and what is installed now.

The wheel is put together from the sdist's Python files and metadata. Its own build would compile a second llama.cpp,
or fetch a build backend only to copy these files.
"""

import base64
import csv
import hashlib
import importlib
import importlib.metadata
import io
import json
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remoe_edge import __version__
from remoe_edge.runtime.pip import run_pip

MANIFEST_NAME = "remoe-edge.json"


@dataclass(frozen=True)
class Manifest:
    """What a runtime was made of. Two runtimes with the same key are the same."""

    key: str
    llama_cpp_python: str
    """Version of the bindings."""
    llama_cpp: str
    """Commit of the pinned llama.cpp, or "checkout"."""
    source: str
    """SHA-256 of the pinned sdist, or of the checkout's files."""
    patches: str
    """SHA-256 over everything that changes llama.cpp."""
    cuda: bool
    flags: list[str]
    """CMake cache settings."""
    compiler: str
    target: str
    """Digest of what the compiler predefines for this CPU."""
    settings: dict[str, str]
    """Compiler settings from the environment, such as CXXFLAGS."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises KeyError, TypeError or ValueError for anything that to_json of this version did not write."""
        content: dict[str, Any] = json.loads(text)
        return cls(**content)


def write_wheel(
    bindings: Path, libraries: Iterable[Path], manifest: Manifest, folder: Path, platform: str | None = None
) -> Path:
    """Write the wheel into ``folder`` and return its path.

    Parameters
    ----------
    bindings
        The unpacked sdist: ``llama_cpp/``, ``PKG-INFO`` and ``LICENSE.md`` are taken from it.
    libraries
        Shared libraries for ``llama_cpp/lib``; each must be a plain file that others find under its own name.
    platform
        Of the machine that they run on, such as "linux_aarch64"; by default this one's.
    """
    version = f"{manifest.llama_cpp_python}+remoe.{manifest.key}"
    platform = platform or sysconfig.get_platform().replace("-", "_").replace(".", "_")
    wheel = folder / f"llama_cpp_python-{version}-py3-none-{platform}.whl"
    info = f"llama_cpp_python-{version}.dist-info"
    package = bindings / "llama_cpp"
    members = {
        path.relative_to(bindings).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.parent != package / "lib"
    }
    members |= {f"llama_cpp/lib/{library.name}": library.read_bytes() for library in sorted(libraries)}
    members[f"llama_cpp/lib/{MANIFEST_NAME}"] = manifest.to_json().encode()
    metadata = (bindings / "PKG-INFO").read_text()
    members[f"{info}/METADATA"] = metadata.replace(
        f"\nVersion: {manifest.llama_cpp_python}\n", f"\nVersion: {version}\n", 1
    ).encode()
    members[f"{info}/licenses/LICENSE.md"] = (bindings / "LICENSE.md").read_bytes()
    members[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: remoe-edge {__version__}\nRoot-Is-Purelib: false\nTag: py3-none-{platform}\n"
    ).encode()
    members[f"{info}/RECORD"] = record(members, f"{info}/RECORD")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, so that equal contents make equal wheels
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return wheel


def record(members: dict[str, bytes], own_name: str) -> bytes:
    """The file RECORD of a wheel, which lists itself as ``own_name``."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([own_name, "", ""])
    return table.getvalue().encode()


def installed_manifest() -> Manifest | None:
    """The manifest of the llama-cpp-python in this environment; None if there is none, or it is not one of ours."""
    importlib.invalidate_caches()
    try:
        distribution = importlib.metadata.distribution("llama-cpp-python")
        # pip writes this file when all others are in place.
        if distribution.read_text("INSTALLER") is None:
            return None
        manifest = Path(str(distribution.locate_file(f"llama_cpp/lib/{MANIFEST_NAME}")))
        return Manifest.from_json(manifest.read_text())
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def install_wheel(wheel: Path) -> None:
    """Install a wheel into the environment of this interpreter, without an index and without dependencies."""
    run_pip("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel))
