"""Speed of the memory: what all usable cores read together."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 128 << 20
_ROUNDS = 4


def memory_bandwidth() -> float:
    """Bytes per second, the best of several passes over memory that no processor cache holds. Takes a second."""
    cores = len(os.sched_getaffinity(0))
    part = np.zeros(_BYTES // 4 // cores, np.float32)
    # Each thread has its own pages, written once, so that they exist.
    parts = [part] + [part + 1 for _ in range(cores - 1)]
    part += 1
    rates = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(_ROUNDS):
            begin = time.monotonic()
            # A maximum is vectorised everywhere, and numpy lets other threads run meanwhile.
            list(pool.map(np.max, parts))
            rates.append(sum(each.nbytes for each in parts) / (time.monotonic() - begin))
    return max(rates)
