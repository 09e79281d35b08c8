"""Wheels for another machine: fetched by pip with the hashes of the pins, kept in the cache folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir
from remoe_edge.jetson.pins import Wheel
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.pip import run_pip

# pip takes the names of platforms literally; a wheel for an older glibc is not found under the name of a newer one.
_GLIBC = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28")


def platform_arguments(python: str, machine: str) -> list[str]:
    """What makes pip choose wheels for a Python ("3.12") on an architecture ("aarch64")."""
    arguments = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    return arguments + [f"--platform={glibc}_{machine}" for glibc in _GLIBC] + [f"--platform=linux_{machine}"]


def fetch_wheels(wheels: Sequence[Wheel], python: str, machine: str, report: Report = silent) -> list[Path]:
    """The files of pinned wheels for a Python and an architecture, in the cache folder; downloaded where missing.

    Raises RemoeError if pip fails, or if what arrives or lies there is not what is pinned.
    """
    folder = cache_dir() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for done, wheel in enumerate(wheels):
        report(f"Fetching {wheel.name} {wheel.version}", done / len(wheels))
        found.append(_fetch(wheel, python, machine, folder))
    return found


def _fetch(wheel: Wheel, python: str, machine: str, folder: Path) -> Path:
    # One folder for each: pip would answer from another Python's wheel, and the name of a file is not known before.
    own = folder / f"{wheel.name}-{wheel.version}-{python}-{machine}"
    kept = list(own.glob("*.whl"))
    if not kept:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            requirement = Path(temporary) / "requirements.txt"
            requirement.write_text(wheel.requirement + "\n")
            try:
                run_pip(
                    "download",
                    "--no-deps",
                    "--require-hashes",
                    f"--requirement={requirement}",
                    f"--dest={temporary}/new",
                    *platform_arguments(python, machine),
                )
            except RemoeError as error:
                raise RemoeError(f"{error}\nCheck the network and pip's index settings") from None
            own.mkdir(exist_ok=True)
            for path in Path(temporary, "new").iterdir():
                path.rename(own / path.name)
        kept = list(own.glob("*.whl"))
    (path,) = kept
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() not in wheel.sha256:
        raise RemoeError(f"{path} is not the pinned file (SHA-256 {digest.hexdigest()}); delete it and retry")
    return path


def install_into(folder: Path, wheels: Iterable[Path], python: str, machine: str) -> None:
    """Install wheels for another machine into a folder, which then belongs on PYTHONPATH there. Compiles nothing."""
    run_pip(
        "install",
        "--no-index",
        "--no-deps",
        "--no-compile",
        f"--target={folder}",
        *platform_arguments(python, machine),
        *map(str, wheels),
    )
