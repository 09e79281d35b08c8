"""The pinned source archive: downloaded once, checked, unpacked."""

import hashlib
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, cache_dir, scratch_folder
from remoe_edge.runtime.pin import Pin
from remoe_edge.runtime.pip import run_pip

_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf")


def fetch_sdist(pin: Pin) -> Path:
    """The pinned sdist of llama-cpp-python in the cache, downloaded with pip if it is not there yet.

    pip finds it at the package index it is configured for. Raises RemoeError if that fails, or if what arrives or
    lies in the cache is not the pinned file.
    """
    sdist = cache_dir() / "sdist" / pin.sdist_name
    if not sdist.exists():
        _download(pin, sdist)
    with sdist.open("rb") as file:
        actual = _sha256(file)
    if actual != pin.sha256:
        raise RemoeError(
            f"{sdist} is not the pinned file (its SHA-256 is {actual}, wanted {pin.sha256}); delete it and retry"
        )
    return sdist


def vendored_converter(pin: Pin) -> Path:
    """The pinned llama.cpp's converter of Hugging Face checkpoints, unpacked in the cache.

    Returns the folder with ``convert_hf_to_gguf.py``, ``conversion/`` and ``gguf-py/``. Raises RemoeError as
    `fetch_sdist` does.
    """
    folder = cache_dir() / "converter" / pin.sha256[:16]
    if not folder.exists():
        sdist = fetch_sdist(pin)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(".unpack-", folder.parent) as temporary:
            vendored = Path("vendor", "llama.cpp")
            unpack(sdist, temporary, only=[vendored / name for name in _CONVERTER])
            try:
                (temporary / vendored).rename(folder)
            except OSError:
                # Another process was quicker, and unpacked the same.
                if not folder.exists():
                    raise
    return folder


def unpack(sdist: Path, folder: Path, only: Sequence[PurePath] = (PurePath(),)) -> None:
    """Unpack the regular files of an sdist into ``folder``, without the archive's top level.

    ``only`` names files and folders in it, the top level left out; by default all.
    Raises RemoeError for links, devices and names that leave the folder.
    """
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isdir():
                continue
            if not member.isfile() or member.name.startswith("/") or ".." in parts or len(parts) < 2:
                raise RemoeError(f"{sdist}: refusing to unpack {member.name!r}, which is not a plain file inside it")
            inside = PurePosixPath(*parts[1:])
            if not any(inside.is_relative_to(part) for part in only):
                continue
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
            os.chmod(target, 0o755 if member.mode & 0o100 else 0o644)
            # Compiler caches distrust files that look newer than the compilation.
            os.utime(target, (member.mtime, member.mtime))


def _download(pin: Pin, sdist: Path) -> None:
    sdist.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(".download-", sdist.parent) as temporary:
        requirement = temporary / "requirements.txt"
        requirement.write_text(f"llama_cpp_python=={pin.version} --hash=sha256:{pin.sha256}\n")
        try:
            run_pip(
                "download",
                "--no-deps",
                "--no-binary=llama-cpp-python",
                "--require-hashes",
                f"--requirement={requirement}",
                f"--dest={temporary}",
            )
        except RemoeError as error:
            raise RemoeError(
                f"{error}\nCheck the network and pip's index settings, or put {pin.sdist_name} into {sdist.parent}"
            ) from None
        with atomic_output(sdist, force=True) as output:
            os.replace(temporary / pin.sdist_name, output)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
