"""Wheels for another machine: fetched by pip with the hashes of the pins, kept in the cache folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir, scratch_folder
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
    folder = wheels_dir(cache_dir(), python, machine)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in wheels if _find(folder, wheel) is None]
    if missing:
        some = ", ".join(wheel.name for wheel in missing[:3]) + (", ..." if len(missing) > 3 else "")
        report(f"Fetching packages for {machine}, Python {python}: {some}", None)
        _download(missing, python, machine, folder)
    found = []
    for wheel in wheels:
        path = _find(folder, wheel)
        if path is None:
            raise RemoeError(f"pip fetched no file of {wheel.name} {wheel.version} for Python {python} on {machine}")
        if (digest := _sha256(path)) not in wheel.sha256:
            raise RemoeError(f"{path} is not the pinned file (SHA-256 {digest}); delete it and retry")
        found.append(path)
    return found


def wheels_dir(cache: Path, python: str, machine: str) -> Path:
    """Where a cache folder keeps wheels; one place for each Python, or pip would answer with another's."""
    return cache / "wheels" / f"{python}-{machine}"


def project(wheel: Path) -> str:
    """The name of the project that a wheel is of, as pip compares names."""
    return re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()


def _find(folder: Path, wheel: Wheel) -> Path | None:
    for path in folder.glob("*.whl"):
        if project(path) == wheel.name and path.name.split("-")[1] == wheel.version:
            return path
    return None


def _download(wheels: Sequence[Wheel], python: str, machine: str, folder: Path) -> None:
    with scratch_folder(".download-", folder.parent) as temporary:
        requirements = temporary / "requirements.txt"
        requirements.write_text("".join(wheel.requirement + "\n" for wheel in wheels))
        try:
            run_pip(
                "download",
                "--no-deps",
                "--require-hashes",
                f"--requirement={requirements}",
                f"--dest={temporary}/new",
                *platform_arguments(python, machine),
            )
        except RemoeError as error:
            raise RemoeError(f"{error}\nCheck the network and pip's index settings") from None
        for path in (temporary / "new").iterdir():
            path.rename(folder / path.name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
