"""Speed of the storage for what the expert cache asks of it: expert slices at random places, several at once."""

from __future__ import annotations

import errno
import mmap
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import Layout
from remoe_edge.gguf_io.runnable import MAX_EXPERTS
from remoe_edge.progress import Report, silent

_ALIGNMENT = 4096
_ROUNDS = 5
_ROUND_BYTES = 256 << 20
_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Slice:
    """Bytes [start, start + length) of a file: one expert's part of one tensor."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Bandwidth:
    """Median over rounds.

    Attributes
    ----------
    bytes_per_s
        Of the slices themselves; what alignment adds to a read does not count.
    read_bytes
        Size of one read: the median slice.
    depth
        Reads at once.
    direct
        Read with O_DIRECT; else through the page cache, after dropping the file's pages.
    """

    bytes_per_s: float
    read_bytes: int
    depth: int
    direct: bool


def expert_slices(layouts: Sequence[Layout]) -> list[Slice]:
    """Every slice of every expert of a model, in file order; empty for a model without experts.

    Raises RemoeError for a tensor with more experts than llama.cpp takes.
    """
    for layout in layouts:
        for tensor in layout.tensors.values():
            if tensor.experts > MAX_EXPERTS:
                raise RemoeError(
                    f"{layout.path}: tensor '{tensor.name}' has {tensor.experts} experts, more than {MAX_EXPERTS}"
                )
    return [
        Slice(layout.path, tensor.start + index * tensor.slice_bytes, tensor.slice_bytes)
        for layout in layouts
        for tensor in layout.tensors.values()
        for index in range(tensor.experts)
    ]


def measure_bandwidth(
    slices: Sequence[Slice], depth: int, *, round_bytes: int = _ROUND_BYTES, report: Report = silent
) -> Bandwidth:
    """Read random slices with `depth` threads, several rounds of about `round_bytes` each.

    No slice is read twice in a round. Raises RemoeError if a file cannot be read, or there is nothing to read.
    """
    if not slices:
        raise RemoeError("the storage cannot be measured: the model has no experts to read")
    choose = random.Random(0)
    with ExitStack() as stack:
        files, direct = _open({piece.path for piece in slices}, stack)
        pool = stack.enter_context(ThreadPoolExecutor(depth))
        buffers = [_buffer(max(piece.length for piece in slices), stack) for _ in range(depth)]
        rates = []
        for done in range(_ROUNDS):
            report("measuring the storage", done / _ROUNDS)
            count = max(depth, round_bytes // slices[0].length)
            chosen = choose.sample(slices, min(count, len(slices)))
            if not direct:
                for descriptor in files.values():
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.monotonic()
            list(pool.map(_read_all, [files] * depth, buffers, [chosen[index::depth] for index in range(depth)]))
            rates.append(sum(piece.length for piece in chosen) / (time.monotonic() - begin))
    return Bandwidth(
        bytes_per_s=statistics.median(rates),
        read_bytes=int(statistics.median(piece.length for piece in slices)),
        depth=depth,
        direct=direct,
    )


def _open(paths: set[Path], stack: ExitStack) -> tuple[dict[Path, int], bool]:
    def opened(flags: int) -> dict[Path, int]:
        files = {}
        for path in paths:
            files[path] = os.open(path, os.O_RDONLY | flags)
            stack.callback(os.close, files[path])
        return files

    try:
        try:
            return opened(os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return opened(0), False
    except OSError as error:
        raise RemoeError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _buffer(length: int, stack: ExitStack) -> mmap.mmap:
    """Memory of the kind that the cache's slots are: private, in large pages where the kernel gives them."""
    room = max(length + 2 * _ALIGNMENT, _BUFFER_BYTES)
    buffer = stack.enter_context(mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _read_all(files: dict[Path, int], buffer: mmap.mmap, slices: Sequence[Slice]) -> None:
    with memoryview(buffer) as view:
        for piece in slices:
            start = piece.start // _ALIGNMENT * _ALIGNMENT
            end = -(-(piece.start + piece.length) // _ALIGNMENT) * _ALIGNMENT
            with view[: end - start] as part:
                count = os.preadv(files[piece.path], [part], start)
            if start + count < piece.start + piece.length:
                raise RemoeError(f"{piece.path}: ends before offset {piece.start + piece.length}")
