"""What JetPack releases hold, and what is fetched to build for them: one file, ``jetson/pins.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import remoe_edge
from remoe_edge.errors import RemoeError

ARCHITECTURE = "aarch64"


@dataclass(frozen=True)
class Wheel:
    """One pinned release on PyPI.

    Attributes
    ----------
    sha256
        Of the files that may be fetched, one for each Python and architecture that has a file of its own.
    """

    name: str
    version: str
    sha256: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """A line of a requirements file."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{digest}" for digest in self.sha256)])


@dataclass(frozen=True)
class JetPack:
    """A major release of JetPack, as far as building for it goes.

    Attributes
    ----------
    l4t
        Major releases of L4T that it comes with.
    glibc, glibcxx
        Newest symbol versions that its Ubuntu has.
    build_image, runtime_image
        Defaults of the container recipe.
    cuda_from
        Where the CUDA cross toolkit comes from: "wheels" (PyPI), or "packages" (NVIDIA's cross packages).
    """

    name: str
    l4t: tuple[str, ...]
    ubuntu: str
    python: str
    cuda: str
    glibc: str
    glibcxx: str
    build_image: str
    runtime_image: str
    cuda_from: str


def recipes_dir() -> Path:
    """The folder ``jetson/``: inside the package when that was installed from a wheel, beside it in a checkout."""
    package = Path(remoe_edge.__file__).parent
    packaged = package / "_jetson"
    return packaged if packaged.is_dir() else package.parent / "jetson"


def jetpack(name: str) -> JetPack:
    """The release that ``name`` ("6", "6.2", "7.2.1") belongs to. Raises RemoeError for one that is not supported."""
    releases = _pins()["jetpack"]
    major = name.partition(".")[0]
    if major not in releases:
        reason = {
            "5": "its CUDA 11.4 and Python 3.8 are too old for the runtime",
            "4": "it has no Orin",
        }.get(major, "it is not known")
        raise RemoeError(f"JetPack {name} is not supported: {reason}; supported are {' and '.join(sorted(releases))}")
    if name in ("7.0", "7.1"):
        raise RemoeError(f"JetPack {name} is not supported: it is for Thor only; on an Orin take 7.2 or newer")
    content = dict(releases[major])
    return JetPack(name=major, l4t=tuple(content.pop("l4t")), **content)


def jetpack_of(l4t: str) -> JetPack:
    """The release with this L4T ("36.4.7"). Raises RemoeError for one that is not supported."""
    for name in _pins()["jetpack"]:
        release = jetpack(name)
        if l4t.partition(".")[0] in release.l4t:
            return release
    supported = ", ".join(f"{each}.x" for name in _pins()["jetpack"] for each in jetpack(name).l4t)
    raise RemoeError(
        f"L4T {l4t} is not supported; JetPack 6 and, on an Orin, 7.2 or newer are (L4T {supported}): flash the device "
        "anew"
    )


def cuda_wheels(kind: str) -> list[Wheel]:
    """The parts of the CUDA 13.2 cross toolkit: "host" (x86-64 compilers) or "target" (aarch64 libraries, headers)."""
    return _wheels(_pins()["cuda_wheels"][kind])


def python_wheels() -> list[Wheel]:
    """remoe-edge's dependencies, in releases that have wheels for every Python of a JetPack."""
    return _wheels(_pins()["python_wheels"])


def _wheels(content: dict[str, Any]) -> list[Wheel]:
    return [Wheel(name, each["version"], tuple(each["sha256"])) for name, each in content.items()]


@cache
def _pins() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((recipes_dir() / "pins.json").read_text())
    return content
