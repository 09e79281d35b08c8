"""Which expert loses its slot: the policies of the expert cache, one instance per MoE layer.

A policy hears of every use, in order, and names a victim among the resident experts that the current token does not
need. The runtime's cache (llama-expert-cache.cpp) follows the same rules, ties included, so that its counters and the
simulator's are equal.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

HALF_LIFE = 16.0
"""Tokens after which a use counts half in the decayed frequency."""

Event = tuple[int, ...]
"""The distinct experts of one token in one layer, as the router ranked them."""


class Policy(ABC):
    """Replacement policy of one layer. Experts are numbers, times are tokens since the start."""

    @abstractmethod
    def __init__(self, events: Sequence[Event | None]) -> None:
        """``events`` holds the whole future, one entry per token; only Belady looks at it."""

    @abstractmethod
    def use(self, expert: int, time: int) -> None:
        """Note that ``expert`` was used. Within a token hits come before misses, each in the router's order."""

    @abstractmethod
    def victim(self, candidates: Collection[int], time: int) -> int:
        """The expert of ``candidates`` (never empty) that is to leave."""


class LRU(Policy):
    """The expert whose last use is longest ago leaves."""

    def __init__(self, events: Sequence[Event | None]) -> None:
        self._clock = 0
        self._last_use: dict[int, int] = {}

    def use(self, expert: int, time: int) -> None:
        # Counts uses, not tokens: experts of one token are ordered too.
        self._clock += 1
        self._last_use[expert] = self._clock

    def victim(self, candidates: Collection[int], time: int) -> int:
        return min(candidates, key=self._last_use.__getitem__)


class DecayedFrequency(Policy):
    """The expert with the lowest decayed number of uses leaves; of equals, the one whose last use is longest ago.

    Each use adds 1 to a score that halves every ``HALF_LIFE`` tokens. Scores outlive residence: an expert that comes
    back still has its past.
    """

    def __init__(self, events: Sequence[Event | None]) -> None:
        self._clock = 0
        self._last_use: dict[int, int] = {}
        self._score: dict[int, tuple[float, int]] = {}

    def use(self, expert: int, time: int) -> None:
        self._clock += 1
        self._last_use[expert] = self._clock
        self._score[expert] = (1.0 + self._decayed(expert, time), time)

    def victim(self, candidates: Collection[int], time: int) -> int:
        return min(candidates, key=lambda expert: (self._decayed(expert, time), self._last_use[expert]))

    def _decayed(self, expert: int, time: int) -> float:
        score, noted_at = self._score.get(expert, (0.0, time))
        return score * math.pow(2.0, (noted_at - time) / HALF_LIFE)


class Belady(Policy):
    """The expert whose next use is farthest ahead leaves: the fewest misses any policy can have."""

    def __init__(self, events: Sequence[Event | None]) -> None:
        self._uses: dict[int, list[int]] = {}
        for time in reversed(range(len(events))):
            for expert in events[time] or ():
                self._uses.setdefault(expert, []).append(time)

    def use(self, expert: int, time: int) -> None:
        self._uses[expert].pop()

    def victim(self, candidates: Collection[int], time: int) -> int:
        return max(candidates, key=lambda expert: self._uses[expert][-1] if self._uses[expert] else math.inf)


POLICIES: dict[str, type[Policy]] = {"lru": LRU, "lfu": DecayedFrequency, "belady": Belady}
"""Policies by the name they have on the command line and in the runtime (Belady exists here only)."""
