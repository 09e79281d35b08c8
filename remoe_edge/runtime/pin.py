"""Which llama.cpp the project builds, and where the patches for it lie."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import remoe_edge


@dataclass(frozen=True)
class Pin:
    """One release of llama-cpp-python, and the llama.cpp it vendors."""

    version: str
    sha256: str
    """Of the sdist on PyPI, in hexadecimal."""
    llama_cpp_commit: str

    @property
    def sdist_name(self) -> str:
        return f"llama_cpp_python-{self.version}.tar.gz"


def patches_dir() -> Path:
    """The folder with ``pin.json``, ``series``, the patches and ``sources/``.

    It lies inside the package when that was installed from a wheel, and beside it in a checkout.
    """
    package = Path(remoe_edge.__file__).parent
    packaged = package / "_patches"
    return packaged if packaged.is_dir() else package.parent / "patches"


def load_pin(patches: Path) -> Pin:
    """Read ``pin.json`` in a folder of patches."""
    content = json.loads((patches / "pin.json").read_text())
    release = content["llama_cpp_python"]
    return Pin(release["version"], release["sha256"], content["llama_cpp"]["commit"])


def source_files(patches: Path) -> Iterator[Path]:
    """The files under ``patches/sources``, sorted, each as a path relative to that folder."""
    sources = patches / "sources"
    return (path.relative_to(sources) for path in sorted(sources.rglob("*")) if path.is_file())


def patch_files(patches: Path) -> list[Path]:
    """The patches that ``patches/series`` names, in order; a missing series is an empty one."""
    series = patches / "series"
    lines = series.read_text().splitlines() if series.exists() else []
    return [patches / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def patches_digest(patches: Path) -> str:
    """SHA-256, in hexadecimal, over names and contents of everything that changes llama.cpp."""
    files = [
        *(Path("sources") / name for name in source_files(patches)),
        *(p.relative_to(patches) for p in patch_files(patches)),
    ]
    digest = hashlib.sha256()
    for name in files:
        content = (patches / name).read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
