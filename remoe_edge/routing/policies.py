"""Which expert loses its slot: the policies of the expert cache, one instance per MoE layer.

A policy hears of every token and names a victim among the resident experts that the current token does not need. The
runtime's policies (llama-expert-policy.cpp) follow the same rules, ties and rounding included, so that its counters and
the simulator's are equal.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HALF_LIFE = 16.0
"""Tokens after which a use counts half in the decayed frequency."""

Event = tuple[int, ...]
"""The distinct experts of one token in one layer, as the router ranked them."""


@dataclass(frozen=True)
class Layer:
    """What a policy is made for."""

    experts: int
    top_k: int
    slots: int
    events: Sequence[Event | None]
    """The whole future, one entry per token, None where the layer was not computed. Only Belady looks at it."""


Floats = npt.NDArray[np.float32]


class Policy(ABC):
    """Replacement policy of one layer. Experts are numbers."""

    @abstractmethod
    def __init__(self, layer: Layer) -> None:
        """The policy of ``layer`` before its first token."""

    @abstractmethod
    def use(self, ranked: Event, used: Sequence[int]) -> None:
        """Note the experts of a token: as ranked by the router, and with hits before misses, each in that order."""

    @abstractmethod
    def victim(self, candidates: Collection[int]) -> int:
        """The expert of ``candidates`` (never empty) that is to leave."""


class LRU(Policy):
    """The expert whose last use is longest ago leaves."""

    def __init__(self, layer: Layer) -> None:
        self._clock = 0
        self._last_use = [0] * layer.experts

    def use(self, ranked: Event, used: Sequence[int]) -> None:
        for expert in used:
            # Counts uses, not tokens: experts of one token are ordered too.
            self._clock += 1
            self._last_use[expert] = self._clock

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=self._last_use.__getitem__)


class DecayedFrequency(LRU):
    """The expert with the lowest decayed number of uses leaves; of equals, the one whose last use is longest ago.

    Each use adds 1 to a score that halves every ``HALF_LIFE`` tokens. Scores outlive residence: an expert that comes
    back still has its past.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._time = 0
        self._score: dict[int, tuple[float, int]] = {}

    def use(self, ranked: Event, used: Sequence[int]) -> None:
        super().use(ranked, used)
        self._time += 1
        for expert in used:
            self._score[expert] = (1.0 + self._decayed(expert), self._time)

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda expert: (self._decayed(expert), self._last_use[expert]))

    def _decayed(self, expert: int) -> float:
        score, noted_at = self._score.get(expert, (0.0, self._time))
        return score * math.pow(2.0, (noted_at - self._time) / HALF_LIFE)


class NextUse(LRU):
    """The expert that is expected back last leaves; of equals, the one whose last use is longest ago.

    How soon an expert comes back is learned while the trace runs, from what the last tokens chose. Each thing that can
    be true of them has a row of one weight per expert: expert i was used by this token, by the one before, by the one
    before that; the two experts ranked first were i and j; the first of this token and of the one before were i and j
    (pairs share ``PAIRS`` rows of each kind by hash). The rows of what is true, summed, give z and with it
    p = 1/2 + z / (2 sqrt(1 + z z)), which is to predict discount^(n - 1) for an expert that is next used n tokens
    later, 0 beyond the horizon. Horizon and discount follow what a slot can outlive, slots / top_k tokens. When the
    horizon has passed, each of the rows moves by rate * (what came - p), at a rate that falls with its updates: an
    online regression to the quantity by which Belady's rule evicts. An expert's worth is z plus a little of its decayed
    frequency, which carries the first tokens.

    Source: our own search, docs/decisions/0007-next-use.md. Floats are IEEE 754 single precision and every operation is
    the runtime's, in its order.
    """

    PAST = 3
    """Tokens whose experts are context."""
    PAIRS = 512
    """Rows that each kind of pair shares."""
    RATE = np.float32(0.01)
    """Learning rate of a row that was updated many times."""
    RATE_NEW = np.float32(0.16)
    """What a row that was updated n times has on top: RATE_NEW / (n + 2)."""
    PAIR_RATE = np.float32(9)
    """How much faster the row of a pair learns."""
    DECAY = np.float32(0.91700404)
    """Of the frequency, per token: half in 8."""
    TINY = np.float32(1e-6)
    """Frequencies below it are 0, so that no number is denormal."""
    FREQUENCY = np.float32(0.12)
    """Weight of the frequency."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        experts, top_k, slots = layer.experts, layer.top_k, layer.slots
        rows = self.PAST * experts + 2 * self.PAIRS
        self._experts = experts
        self._weights: Floats = np.zeros((rows, experts), np.float32)
        self._updates: Floats = np.zeros(rows, np.float32)
        self._scale: Floats = np.ones(rows, np.float32)
        self._scale[self.PAST * experts :] = self.PAIR_RATE
        self._frequency: Floats = np.zeros(experts, np.float32)
        self._worth: list[float] = []
        # The last tokens and what was true after each.
        self._horizon = max(2, (6 * slots + top_k) // (2 * top_k))
        self._events: deque[list[int]] = deque(maxlen=self._horizon)
        self._contexts: deque[list[int]] = deque(maxlen=self._horizon)
        one = np.float32(1)
        discount = one - np.float32(top_k) / np.float32(2 * slots)
        self._gains = [one]
        while len(self._gains) < self._horizon:
            self._gains.append(self._gains[-1] * discount)
        # The z of an expert that is used by chance.
        u = min(np.float32(2 * top_k) / np.float32(experts) - one, np.float32(0.9))
        self._bias = u / np.sqrt(one - u * u)

    def use(self, ranked: Event, used: Sequence[int]) -> None:
        super().use(ranked, used)
        full = len(self._events) == self._horizon
        self._events.append(list(ranked))
        if full:
            self._learn(self._contexts[0])
        self._contexts.append(self._context())
        self._frequency *= self.DECAY
        self._frequency[self._frequency < self.TINY] = 0
        self._frequency[self._events[-1]] += np.float32(1)
        self._worth = []

    def victim(self, candidates: Collection[int]) -> int:
        if not self._worth:
            self._worth = (self._predict(self._contexts[-1]) + self.FREQUENCY * self._frequency).tolist()
        return min(candidates, key=lambda expert: (self._worth[expert], self._last_use[expert]))

    def _context(self) -> list[int]:
        """The rows of what is true now."""
        past = [self._events[-1 - n] for n in range(min(self.PAST, len(self._events)))]
        rows = [n * self._experts + expert for n, event in enumerate(past) for expert in event]
        first = self.PAST * self._experts
        now = past[0]
        if len(now) > 1:
            rows.append(first + _pair(min(now[:2]), max(now[:2])) % self.PAIRS)
        if len(past) > 1:
            rows.append(first + self.PAIRS + _pair(now[0], past[1][0]) % self.PAIRS)
        return rows

    def _predict(self, rows: list[int]) -> Floats:
        # Adds row by row, in their order: numpy sums pairwise only along the axis that is contiguous.
        z: Floats = self._weights[rows].sum(axis=0, initial=self._bias)
        return z

    def _learn(self, rows: list[int]) -> None:
        """Move the rows of the context that lies a horizon back."""
        error: Floats = np.zeros(self._experts, np.float32)
        # The nearest use of an expert is written last.
        for gain, event in zip(reversed(self._gains), reversed(self._events), strict=True):
            error[event] = gain
        z = self._predict(rows)
        error -= z / np.sqrt(np.float32(1) + z * z) * np.float32(0.5) + np.float32(0.5)
        rates = (self.RATE + self.RATE_NEW / (self._updates[rows] + np.float32(2))) * self._scale[rows]
        self._updates[rows] += np.float32(1)
        self._weights[rows] += rates[:, None] * error


def _pair(a: int, b: int) -> int:
    """Hash of a pair of experts, 32 bits."""
    h = (a * 0x9E3779B1 ^ b * 0x85EBCA6B) & 0xFFFFFFFF
    h ^= h >> 15
    h = h * 0x2C1B3C6D & 0xFFFFFFFF
    return h ^ h >> 13


class Belady(Policy):
    """The expert whose next use is farthest ahead leaves: the fewest misses any policy can have.

    Of experts that are next used by the same token, or never again, the lowest number leaves.
    """

    def __init__(self, layer: Layer) -> None:
        self._uses: list[list[float]] = [[math.inf] for _ in range(layer.experts)]
        for time in reversed(range(len(layer.events))):
            for expert in layer.events[time] or ():
                self._uses[expert].append(time)

    def use(self, ranked: Event, used: Sequence[int]) -> None:
        for expert in used:
            self._uses[expert].pop()

    def victim(self, candidates: Collection[int]) -> int:
        return max(candidates, key=lambda expert: (self._uses[expert][-1], -expert))


POLICIES: dict[str, type[Policy]] = {"next-use": NextUse, "lfu": DecayedFrequency, "lru": LRU, "belady": Belady}
"""Policies by the name they have on the command line and in the runtime (Belady exists here only)."""
