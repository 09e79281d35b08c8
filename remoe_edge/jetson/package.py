"""The wheel of the remoe-edge that is running, from a checkout or from where it is installed."""

from __future__ import annotations

import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path

import remoe_edge
from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.jetson.pins import recipes_dir
from remoe_edge.runtime.pin import patches_dir
from remoe_edge.runtime.wheel import record

_MOVED = {"_patches": patches_dir, "_jetson": recipes_dir}
"""Folders that lie beside the package in a checkout, and inside it in a wheel."""


def write_package(folder: Path) -> Path:
    """Write the wheel into ``folder`` and return its path. It is pure Python: one file for every machine.

    pip could build it from a checkout, but fetches a build backend for that, and has nothing to build from elsewhere.
    """
    info = f"remoe_edge-{__version__}.dist-info"
    try:
        metadata = importlib.metadata.distribution("remoe-edge").read_text("METADATA")
    except importlib.metadata.PackageNotFoundError:
        metadata = None
    if metadata is None:
        raise RemoeError("remoe-edge is not installed in this environment: run pip install -e . in its folder")
    members = dict(_members())
    members[f"{info}/METADATA"] = metadata.encode()
    members[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: remoe-edge {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n".encode()
    )
    members[f"{info}/entry_points.txt"] = b"[console_scripts]\nremoe-edge = remoe_edge.cli:main\n"
    members[f"{info}/RECORD"] = record(members, f"{info}/RECORD")
    wheel = folder / f"remoe_edge-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, so that equal contents make equal wheels
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return wheel


def _members() -> Iterator[tuple[str, bytes]]:
    package = Path(remoe_edge.__file__).parent
    for path in _files(package):
        inside = path.relative_to(package)
        if inside.parts[0] not in _MOVED:
            yield f"remoe_edge/{inside.as_posix()}", path.read_bytes()
    for name, folder in _MOVED.items():
        for path in _files(folder()):
            yield f"remoe_edge/{name}/{path.relative_to(folder()).as_posix()}", path.read_bytes()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path
