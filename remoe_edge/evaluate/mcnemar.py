"""Whether two models answer the same items differently."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any


def mcnemar(base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, Any]:
    """Exact McNemar test (1947) of right answers to the same items.

    `base_only` and `tuned_only` count items that one side alone got right; `p_value` is two-sided and exact (binomial).
    """
    lost = sum(a and not b for a, b in zip(base, tuned, strict=True))
    won = sum(b and not a for a, b in zip(base, tuned, strict=True))
    n = lost + won
    # Whole numbers: 2**n is beyond a float for some thousand items.
    tail = sum(comb(n, i) for i in range(min(lost, won) + 1)) * 2
    return {
        "items": len(base),
        "base": sum(base) / max(1, len(base)),
        "tuned": sum(tuned) / max(1, len(tuned)),
        "base_only": lost,
        "tuned_only": won,
        "p_value": min(1.0, tail / 2**n),
    }
