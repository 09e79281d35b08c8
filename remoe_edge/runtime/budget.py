"""How a budget in bytes becomes slots: the arithmetic of the runtime's expert cache, before there is a runtime.

Every layer gets the same number of slots, and the budget covers slots and metadata, rounding included. The functions
follow llama-expert-cache.cpp (bytes_for, n_slots_for) and the `bytes` functions of llama-expert-policy.cpp, for kernels
that take experts as they lie in the file. The sizes of C++ objects are those of a 64-bit Linux; where another compiler
has others, a result is off by a few bytes for each slot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import Layout, align

READERS = 4
"""Reader threads that the runtime starts unless told otherwise."""
MOST_READERS = 16
"""Of those that it finds by reading ("auto")."""

_PAGE = 4096
_READER_STACK = 64 << 10
_CACHE, _GROUP, _TENSOR, _SLICE, _REQUEST = 728, 568, 136, 12, 20
_LRU, _LFU, _NEXT_USE, _MOMENT, _COUNT = 40, 72, 240, 48, 16
_PAST, _PAIRS = 3, 512
_VECTOR, _CHECKSUM = 24, 8
_STAGING = 2 << 20
_NAME = re.compile(r"blk\.([0-9]+)\.ffn_(?:up|gate|down|gate_up)_((?:ch)?exps)\.weight")


@dataclass(frozen=True)
class ExpertGroup:
    """What a slot of one MoE layer holds: an expert's slice of each of its tensors.

    Attributes
    ----------
    top_k
        Experts that a token uses.
    slices
        Start in the file of expert 0's slice, and its length in bytes, of each tensor.
    """

    experts: int
    top_k: int
    slices: tuple[tuple[int, int], ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes that one miss reads."""
        return sum(length for _, length in self.slices)


def expert_groups(layouts: Sequence[Layout]) -> list[ExpertGroup]:
    """The MoE layers of a model in their order. Raises RemoeError if it has none, or its metadata lacks what it needs.

    A block with two kinds of experts (GroveMoE) counts as two layers, as in the runtime.
    """
    found: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for layout in layouts:
        for tensor in layout.tensors.values():
            if match := _NAME.fullmatch(tensor.name):
                part = tensor.experts, tensor.start, tensor.slice_bytes
                found.setdefault((int(match[1]), match[2]), []).append(part)
    first = layouts[0]
    if not found:
        raise RemoeError(f"{first.path}: has no experts; the expert cache is for Mixture-of-Experts models")
    key = f"{first.text('general.architecture')}.expert_used_count"
    used = first.integers(key, max(block for block, _ in found) + 1)
    if used is None:
        raise RemoeError(f"{first.path}: has no key '{key}', so it is not known how many experts a token uses")
    groups = []
    # By block, and within it in the order of names, as the runtime has them.
    for (block, kind), parts in sorted(found.items()):
        counts = {experts for experts, _, _ in parts}
        if len(counts) > 1 or not 0 < used[block] <= max(counts):
            raise RemoeError(
                f"{first.path}: block {block} has {sorted(counts)} experts in its {kind} tensors and uses {used[block]}"
            )
        groups.append(ExpertGroup(counts.pop(), used[block], tuple((start, length) for _, start, length in parts)))
    return groups


def cache_bytes(
    groups: Sequence[ExpertGroup],
    slots: int,
    policy: str,
    readers: int = READERS,
    *,
    checksums: bool = False,
    repack: bool = False,
) -> int:
    """Bytes that a cache with so many slots in every layer takes.

    Parameters
    ----------
    policy
        One of the runtime's.
    readers
        Reader threads.
    checksums
        With those of `CacheConfig.verify`.
    repack
        With experts rearranged for a CPU's kernels: as much as that can take, since only that CPU knows which of them.
    """
    total = _CACHE + readers * _READER_STACK
    if repack:
        longest = max(length for group in groups for _, length in group.slices)
        total += readers * align(longest + 2 * _PAGE, _STAGING)
    for group in groups:
        if checksums:
            total += len(group.slices) * (_VECTOR + group.experts * _CHECKSUM)
        own = min(slots, group.experts)
        total += _GROUP + _policy_bytes(policy, group, own) + group.experts * 7 * 4 + own * 3 * 4
        for start, length in group.slices:
            total += _TENSOR + own * (_slot_bytes(start, length) + _SLICE + _REQUEST) + _PAGE
    return total


def least_slots(groups: Sequence[ExpertGroup]) -> int:
    """The least number of slots per layer that can work: the experts of one token."""
    return max(group.top_k for group in groups)


def most_slots(groups: Sequence[ExpertGroup]) -> int:
    """The number of slots per layer that holds all experts."""
    return max(group.experts for group in groups)


def floor_bytes(groups: Sequence[ExpertGroup], policy: str) -> int:
    """The least budget that can work."""
    return cache_bytes(groups, least_slots(groups), policy)


def slots_for(groups: Sequence[ExpertGroup], budget: int, policy: str) -> int:
    """Slots per layer that a budget pays for, at most one for each expert; 0 if it is below the floor."""
    low, high = least_slots(groups) - 1, most_slots(groups)
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(groups, middle, policy) <= budget:
            low = middle
        else:
            high = middle - 1
    return low if low >= least_slots(groups) else 0


def _slot_bytes(start: int, length: int) -> int:
    if start % _PAGE == 0 and length % _PAGE == 0:
        return length
    # Room for a slice that begins anywhere in a page.
    return align(_PAGE - 1 + length, _PAGE)


def _policy_bytes(policy: str, group: ExpertGroup, slots: int) -> int:
    experts, top_k = group.experts, group.top_k
    if policy == "lru":
        return _LRU + experts * 8
    if policy == "lfu":
        return _LFU + experts * (8 + _COUNT)
    if policy == "next-use":
        rows = _PAST * experts + 2 * _PAIRS
        horizon = max(2, (6 * slots + top_k) // (2 * top_k))
        true = _PAST * top_k + 2
        return (
            _NEXT_USE + experts * (8 + 3 * 4) + rows * (experts + 1) * 4 + horizon * (_MOMENT + 4 + (top_k + true) * 4)
        )
    raise ValueError(f"the runtime has no policy {policy!r}")
