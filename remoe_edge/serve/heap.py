"""The allocator of a process that answers for weeks."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 128 * 1024
"""glibc's own first threshold, bytes."""


def keep_heap_compact() -> bool:
    """Large blocks are mapped for good; False where the C library has no such setting.

    asyncio reads into blocks of 256 KiB that it shrinks to what came. glibc raises its threshold for mapping once such
    a block has been freed, cuts them from its heap from then on, and what a request leaves there keeps the next one
    from fitting: 0.6 MB more for every thousand requests, all of it free memory. Setting the threshold keeps it fixed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGE) == 1
