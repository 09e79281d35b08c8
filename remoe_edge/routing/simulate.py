"""An expert cache in miniature: what hits a routing trace gives with a number of slots and a policy.

The cache is event-atomic, as the runtime's is. An event is one token in one layer. All its experts are looked up before
any slot changes, and the policy is told: hits first, then misses, each in the router's order. Then each miss in turn
evicts its victim, if no slot is free, and takes the slot. No expert of the event is ever a victim, and every
miss is admitted. Each layer has its own slots. A layer that was not computed for a token has no event there.

At the first token the cache is empty and its policy has learned nothing. Between the sequences of a trace both stay
as they are, as in a server ("carried"), or start anew, as in a process for each request ("cold").

`replay_layer` says all this in Python, around the policies in `policies.py`. `simulate_all` runs the same in machine
code around the policies of the runtime (`native.py`); the tests hold one to the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.errors import RemoeError
from remoe_edge.progress import Report, silent
from remoe_edge.routing import native
from remoe_edge.routing.policies import POLICIES, Event, Layer
from remoe_edge.routing.trace import NOT_COMPUTED, Trace, reuse_rate

CACHES = ("carried", "cold")
"""What becomes of the cache where a sequence of the trace ends."""

_RESAMPLES = 2_000
_Counters = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counters:
    """What a cache did: distinct experts of all events, found in a slot or not, and experts that lost their slot."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a cache did on a trace.

    Attributes
    ----------
    slots
        Per layer, as asked for; never more than there are experts are used.
    tokens
        Of the trace, those with at least one layer computed.
    reuse_rate
        Between 0 and 1; None for a trace without two tokens in a row.
    counters
        [layers, sequences, 3]: hits, misses, evictions.
    """

    trace: str
    slots: int
    policy: str
    cache: str
    tokens: int
    reuse_rate: float | None
    counters: _Counters

    @property
    def hits(self) -> int:
        return int(self.counters[..., 0].sum())

    @property
    def misses(self) -> int:
        return int(self.counters[..., 1].sum())

    @property
    def evictions(self) -> int:
        return int(self.counters[..., 2].sum())

    @property
    def hit_rate(self) -> float:
        """Part of the looked up experts that were in a slot, between 0 and 1."""
        return self.hits / (self.hits + self.misses)

    @property
    def misses_per_token(self) -> float:
        """All layers together."""
        return self.misses / self.tokens

    @property
    def layer_misses_per_token(self) -> list[float]:
        return [float(misses / self.tokens) for misses in self.counters[..., 1].sum(axis=1)]

    @property
    def layer_hit_rate(self) -> list[float | None]:
        """None for a layer that was not computed for any token."""
        hits, misses, _ = self.counters.sum(axis=1).T
        return [float(hit / (hit + miss)) if hit + miss else None for hit, miss in zip(hits, misses, strict=True)]

    def row(self) -> dict[str, Any]:
        """The fields of a result row, ready for JSON."""
        return {
            "trace": self.trace,
            "slots": self.slots,
            "policy": self.policy,
            "cache": self.cache,
            "hit_rate": self.hit_rate,
            "reuse_rate": self.reuse_rate,
            "tokens": self.tokens,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
            "misses_per_token": self.misses_per_token,
            "layer_hit_rate": self.layer_hit_rate,
        }


@dataclass(frozen=True)
class MissChange:
    """How the miss rate differs between two traces: 0.1 is 10 % more misses.

    `ci95` is a paired bootstrap over sequences; None unless both traces have the same number of them, two or more.
    """

    change: float
    ci95: tuple[float, float] | None


def simulate(trace: Trace, slots: int, policy: str, *, cache: str = "carried") -> Simulation:
    """Run ``trace`` through ``slots`` slots per layer under ``policy``, a key of POLICIES; ``cache`` is one of CACHES.

    Raises RemoeError if the slots cannot hold the experts of one token, or no layer was computed.
    """
    return simulate_all(trace, [(slots, policy)], cache=cache)[0]


def simulate_all(
    trace: Trace, runs: Sequence[tuple[int, str]], *, cache: str = "carried", report: Report = silent
) -> list[Simulation]:
    """`simulate` for several pairs of slots and policy, on all usable cores, in the order of ``runs``.

    Without a C++ compiler the Python policies do the work, which takes many times as long; ``report`` is told.
    """
    for slots, _ in runs:
        if slots < trace.top_k:
            raise RemoeError(
                f"{slots} slots per layer cannot hold the {trace.top_k} experts of one token; use {trace.top_k} or more"
            )
    if not trace.computed.any():
        raise RemoeError(f"{trace.origin}: no layer was computed for any token; record a decode run")
    label, work = "simulating", _compiled
    try:
        native.prepare()
    except RemoeError as error:
        label, work = f"simulating slowly, in Python ({error})", _reference
    distinct = list(dict.fromkeys((min(slots, trace.experts), policy) for slots, policy in runs))
    counters = {run: np.zeros((trace.layers, len(trace.offs) - 1, 3), np.int64) for run in distinct}
    # The longest runs first, so that no core is left with one of them at the end.
    jobs = [(run, layer) for run in sorted(distinct, key=_cost, reverse=True) for layer in range(trace.layers)]
    whole, done = sum(_cost(run) for run, _ in jobs), 0.0
    report(label, 0.0)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if work is _compiled else 1)
    try:
        layer_ids = _layer_ids(trace)
        waiting = {
            pool.submit(work, trace, layer_ids[layer], slots, policy, cache == "cold"): ((slots, policy), layer)
            for (slots, policy), layer in jobs
        }
        for future in as_completed(waiting):
            run, layer = waiting[future]
            counters[run][layer] = future.result()
            done += _cost(run)
            report(label, done / whole)
    finally:
        # What Ctrl-C leaves is a layer at most.
        pool.shutdown(cancel_futures=True)
    reuse = reuse_rate(trace).total
    tokens = int(trace.computed.any(axis=1).sum())
    return [
        Simulation(trace.origin, slots, policy, cache, tokens, reuse, counters[min(slots, trace.experts), policy])
        for slots, policy in runs
    ]


def miss_change(base: Simulation, other: Simulation) -> MissChange:
    """How the miss rate of ``other`` differs from that of ``base``. A base without misses gives a change of 0."""
    pair = [row.counters.sum(axis=0)[:, :2].astype(np.float64) for row in (base, other)]

    def change(parts: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        old, new = (part[..., 1].sum(axis=-1) / np.maximum(part.sum(axis=(-1, -2)), 1) for part in parts)
        relative: npt.NDArray[np.float64] = np.divide(new - old, old, out=np.zeros_like(old), where=old > 0)
        return relative

    count = len(pair[0])
    total = float(change([part[np.newaxis] for part in pair])[0])
    if count < 2 or count != len(pair[1]):
        return MissChange(total, None)
    drawn = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    low, high = np.percentile(change([part[drawn] for part in pair]), (2.5, 97.5))
    return MissChange(total, (float(low), float(high)))


def layer_events(trace: Trace, layer: int) -> list[Event | None]:
    """The events of one layer, one entry per token; None where the layer was not computed."""
    rows = trace.ids[:, layer].tolist()
    return [tuple(row) if computed else None for row, computed in zip(rows, trace.computed[:, layer], strict=True)]


def simulate_layer(layer: Layer, policy: str) -> Counters:
    """Counters of one layer that starts cold under ``policy``, a key of POLICIES. Its slots hold the largest event."""
    hits = misses = evictions = 0
    for found, missing, victims in replay_layer(layer, policy):
        hits += len(found)
        misses += len(missing)
        evictions += len(victims)
    return Counters(hits, misses, evictions)


def replay_layer(layer: Layer, policy: str) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """The experts found, missed and evicted at each event of one layer that starts cold."""
    choice = POLICIES[policy](layer)
    resident: set[int] = set()
    for event in layer.events:
        if event is None:
            continue
        found = [expert for expert in event if expert in resident]
        missing = [expert for expert in event if expert not in resident]
        choice.use(event, found + missing)
        victims = []
        for expert in missing:
            if len(resident) == layer.slots:
                victims.append(choice.victim(resident.difference(event)))
                resident.remove(victims[-1])
            resident.add(expert)
        yield found, missing, victims


_Work = Callable[[Trace, npt.NDArray[np.uint16], int, str, bool], _Counters]


def _layer_ids(trace: Trace) -> npt.NDArray[np.uint16]:
    """[layers, tokens, k], NOT_COMPUTED where a layer was not computed."""
    ids = np.ascontiguousarray(trace.ids.transpose(1, 0, 2)).astype(np.uint16)
    ids[~trace.computed.T] = NOT_COMPUTED
    return ids


def _cost(run: tuple[int, str]) -> float:
    # Measured: next-use takes about four times as long as the others.
    return 4.0 if run[1] == "next-use" else 1.0


def _compiled(trace: Trace, ids: npt.NDArray[np.uint16], slots: int, policy: str, cold: bool) -> _Counters:
    return native.replay(policy, ids, trace.offs, experts=trace.experts, slots=slots, cold=cold)


def _reference(trace: Trace, ids: npt.NDArray[np.uint16], slots: int, policy: str, cold: bool) -> _Counters:
    """[sequences, 3]: hits, misses, evictions of one layer, by `replay_layer`."""
    events = [None if row[0] == NOT_COMPUTED else tuple(row) for row in ids.tolist()]
    sequences = [events[begin:end] for begin, end in pairwise(trace.offs.tolist())]
    counters = np.zeros((len(sequences), 3), np.int64)
    replay = partial(_replay, trace, slots, policy)
    steps = iter(()) if cold else replay(events)
    for sequence, own in zip(counters, sequences, strict=True):
        computed = sum(event is not None for event in own)
        for step in islice(replay(own) if cold else steps, computed):
            sequence += [len(part) for part in step]
    return counters


def _replay(trace: Trace, slots: int, policy: str, events: list[Event | None]) -> Iterator[tuple[list[int], ...]]:
    return replay_layer(Layer(trace.experts, trace.top_k, slots, events), policy)
