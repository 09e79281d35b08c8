"""An input file that must stay what it was while we believe what we read from it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError


@dataclass(frozen=True)
class Source:
    """A regular file and what `stat` said about it when it was first looked at.

    Offsets and lengths are checked once, against `size`. `open` refuses a file that is no longer the one they were
    checked against, so a check never has to be repeated where the bytes are used.
    """

    path: Path
    size: int
    identity: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> Source:
        """Look at `path`. Raises RemoeError if there is no such file or it is not a regular one."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise RemoeError(f"{path}: cannot be read: {error.strerror}") from error
        # Opening a FIFO would wait for a writer for ever.
        if not stat.S_ISREG(status.st_mode):
            raise RemoeError(f"{path}: not a regular file")
        return cls(path, status.st_size, _identity(status))

    @contextmanager
    def open(self) -> Iterator[int]:
        """Yield a read-only descriptor. Raises RemoeError if the file is not, or does not stay, the one looked at."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise RemoeError(f"{self.path}: cannot be read: {error.strerror}") from error
        try:
            self._check(descriptor)
            yield descriptor
            self._check(descriptor)
        finally:
            os.close(descriptor)

    def read(self, descriptor: int, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`. Raises RemoeError, naming the offset, on an I/O error or a short file."""
        parts = []
        while length:
            try:
                part = os.pread(descriptor, length, offset)
            except OSError as error:
                raise RemoeError(f"{self.path}: read error at offset {offset}: {error.strerror}") from error
            if not part:
                raise RemoeError(f"{self.path}: ends at offset {offset}, {length} bytes too early")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, descriptor: int) -> None:
        if _identity(os.fstat(descriptor)) != self.identity:
            raise RemoeError(f"{self.path}: changed while it was being read; start again when nothing writes to it")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
