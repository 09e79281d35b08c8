"""Output files that appear whole or not at all, and the folder for what can be made again."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from remoe_edge.errors import RemoeError

_NO_SPACE = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise ulimit -f"}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
# A filesystem that cannot flush a folder, or a folder that may not be read: the output itself is flushed.
_NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


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
    """Raise RemoeError if an output at ``path`` would replace something it must not, or its folder takes no files.

    With ``force`` a regular file may be replaced; a folder, device, socket or pipe never is. A folder that does not
    exist is no error here.
    """
    if path.exists() and not path.is_file():
        raise RemoeError(f"{path} is not a regular file; choose another output path")
    if not force and os.path.lexists(path):
        raise RemoeError(f"{path} exists; pass --force to overwrite it")
    folder = path.resolve().parent
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise RemoeError(f"{path}: no file can be made in {folder} by this user; choose another folder")


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths name one existing file, also through links; False if either does not exist."""
    try:
        return os.path.samefile(a, b)
    except FileNotFoundError:
        return False


def write_failure(path: Path, error: OSError) -> RemoeError:
    """What to tell of an error while `path` was being made: what it was, and what to do."""
    advice = ""
    if error.errno in _NO_SPACE:
        advice = f"; {_NO_SPACE[error.errno]} or choose another folder"
    elif error.errno in _NO_RIGHT:
        advice = "; choose another folder"
    return RemoeError(f"{path}: cannot be written: {error.strerror or error}{advice}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system in this context become a RemoeError that names `path`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary file next to ``path``; the caller fills it (opens it "wb"), and on success it becomes ``path``.

    The file and its folder are flushed to disk before the context ends. On any exception, Ctrl-C included, the
    temporary file is removed and ``path`` is as it was; what a killed process left, the next call removes. A symbolic
    link at ``path`` is followed, not replaced.

    Raises RemoeError if ``path`` exists and ``force`` is false, if it is no regular file, if its folder is missing, and
    where the disk is full or may not be written.
    """
    refuse_existing(path, force)
    target = path.resolve()
    with scratch_file(path) as temporary:
        yield temporary
        _fsync(temporary)
        # Someone else may have written the output while this one was being made.
        refuse_existing(path, force)
        os.replace(temporary, target)
    _fsync_folder(target)


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Give an empty temporary file next to `path`, for what is needed only while `path` is being made.

    It is removed when the context ends; what a killed process left, the next call for `path` removes. Raises RemoeError
    if the folder is missing, and where the disk is full or may not be written.
    """
    target = path.resolve()
    if not target.parent.is_dir():
        raise RemoeError(f"{target.parent} is not a folder; create it before writing {path.name} there")
    # File systems limit the bytes of a name.
    prefix = f".{os.fsencode(target.name)[:200].decode(errors='ignore')}.tmp-"
    _remove_leftovers(target.parent, prefix)
    temporary: Path | None = None
    try:
        temporary, lock = _create_locked(target.parent, prefix, folder=False)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        # Others are about what the caller reads, and name it.
        if _is_about_writing(error, temporary):
            raise write_failure(path, error) from error
        raise


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder in `parent`, by default where temporary files belong, removed when the context ends.

    What a killed process left, the next call with this `prefix` by the same user removes. Raises RemoeError where no
    folder can be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_leftovers(parent, prefix)
    with writing(parent):
        folder, lock = _create_locked(parent, prefix, folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def append_line(file: IO[bytes], content: Mapping[str, Any]) -> None:
    """Append `content` as a line of JSON to a file opened for appending; it is on disk when this returns.

    Raises RemoeError if it cannot be written; the file may then end in a part of the line.
    """
    data = memoryview(json.dumps(content).encode() + b"\n")
    file.flush()
    with writing(Path(file.name)):
        # Past the file's buffer, which would try again when it is closed.
        while data:
            data = data[os.write(file.fileno(), data) :]
        os.fsync(file.fileno())


def _is_about_writing(error: OSError, temporary: Path | None) -> bool:
    # Without a name: from a write, or from a read on a drive that fails.
    if error.filename is None:
        return error.errno in {*_NO_SPACE, *_NO_RIGHT, errno.EIO}
    return temporary is None or error.filename == os.fspath(temporary)


def _create_locked(parent: Path, prefix: str, *, folder: bool) -> tuple[Path, int]:
    """A new empty file or folder, and the open descriptor with its lock.

    The lock tells one that is in use from one that a killed process left behind.
    """
    while True:
        path = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        if folder:
            path.mkdir(mode=0o700)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # Where files cannot be locked, nothing is taken for left behind either.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have taken it for left behind before it was locked.
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    ours = re.compile(rf"{re.escape(prefix)}\d+-[0-9a-f]{{8}}")
    try:
        left = [path for path in parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:
        # A folder that may be written and not be listed.
        return
    for path in left:
        # In use, or someone else's.
        with suppress(OSError):
            _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.is_dir():
            path.unlink()
        elif path.stat().st_uid == os.geteuid():
            shutil.rmtree(path)
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(target: Path) -> None:
    """Flush the folder of a file that has just got its name."""
    try:
        _fsync(target.parent)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise RemoeError(
                f"{target}: is written and whole, but its folder could not be flushed to disk ({error.strerror}): a "
                "power cut now may lose it"
            ) from error
