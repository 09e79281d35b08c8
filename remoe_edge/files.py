"""Output files that appear whole or not at all, and the folder for what can be made again."""

import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remoe_edge.errors import RemoeError


def cache_dir() -> Path:
    """The folder of downloads, runtimes and generated models; it may not exist yet.

    ``$REMOE_EDGE_CACHE``, else ``remoe-edge`` in ``$XDG_CACHE_HOME``, else ``~/.cache/remoe-edge``.
    """
    if own := os.environ.get("REMOE_EDGE_CACHE"):
        return Path(own).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "remoe-edge"


def refuse_existing(path: Path, force: bool) -> None:
    """Raise RemoeError if an output at ``path`` would replace something it must not.

    With ``force`` a regular file may be replaced; a folder, device, socket or pipe never is.
    """
    if path.exists() and not path.is_file():
        raise RemoeError(f"{path} is not a regular file; choose another output path")
    if not force and os.path.lexists(path):
        raise RemoeError(f"{path} exists; pass --force to overwrite it")


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths name one existing file, also through links; False if either does not exist."""
    try:
        return os.path.samefile(a, b)
    except FileNotFoundError:
        return False


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary file next to ``path``; the caller fills it (opens it "wb"), and on success it becomes ``path``.

    The file and its folder are flushed to disk before the context ends. On any exception, Ctrl-C included, the
    temporary file is removed and ``path`` is as it was; what a killed process left, the next call removes. A symbolic
    link at ``path`` is followed, not replaced.

    Raises RemoeError if ``path`` exists and ``force`` is false, if it is no regular file, or if its folder is missing.
    """
    refuse_existing(path, force)
    target = path.resolve()
    with scratch_file(path) as temporary:
        yield temporary
        _fsync(temporary)
        # Someone else may have written the output while this one was being made.
        refuse_existing(path, force)
        os.replace(temporary, target)
    _fsync(target.parent)


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Give an empty temporary file next to `path`, for what is needed only while `path` is being made.

    It is removed when the context ends; what a killed process left, the next call for `path` removes. Raises RemoeError
    if the folder is missing.
    """
    target = path.resolve()
    if not target.parent.is_dir():
        raise RemoeError(f"{target.parent} is not a folder; create it before writing {path.name} there")
    prefix = f".{target.name[:200]}.tmp-"
    _remove_leftovers(target.parent, prefix)
    temporary = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    # The lock tells a file that is being written from one that a killed process left behind.
    lock = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    for leftover in folder.glob(f"{glob.escape(prefix)}*"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
