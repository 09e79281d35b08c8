"""Misses of an event-atomic LRU cache for many sequences at once, each starting cold.

The same rules as `remoe_edge.routing.simulate` (a test compares), computed side by side for all sequences, layers and
sizes, because a bootstrap over sequences wants each one's misses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def cold_misses(ids: npt.NDArray[np.integer], experts: int, slots: Sequence[int]) -> Ints:
    """Misses [slots, rows, layers] for ids [rows, tokens, layers, k]; each of `slots` is at least k."""
    rows, tokens, layers, k = ids.shape
    lanes = len(slots) * rows * layers
    flat = np.tile(ids.transpose(1, 0, 2, 3).reshape(tokens, rows * layers, k), (1, len(slots), 1))
    room = np.repeat(np.asarray(slots), rows * layers)
    # The clock of each expert's last use; 0: not resident.
    used = np.zeros((lanes, experts), np.int32)
    misses = np.zeros(lanes, np.int64)
    lane = np.arange(lanes)[:, None]
    for token in range(tokens):
        now = flat[token]
        resident = used[lane, now] > 0
        misses += k - resident.sum(1)
        # Hits are noted before misses, each in the router's order: their ranks order them for later.
        rank = np.where(resident, 0, k) + np.arange(k)
        used[lane, now] = token * 2 * k + 1 + rank
        over = (used > 0).sum(1) - room
        for _ in range(int(over.max(initial=0))):
            # No expert of this event is the oldest, since room is at least k.
            age = np.where(used > 0, used, np.iinfo(np.int32).max)
            oldest = age.argmin(1)
            used[(over > 0).nonzero()[0], oldest[over > 0]] = 0
            over -= 1
    return misses.reshape(len(slots), rows, layers)
