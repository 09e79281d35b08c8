"""An expert cache in miniature: what hits a routing trace gives with a number of slots and a policy.

The cache is event-atomic, as the runtime's is. An event is one token in one layer. All its experts are looked up before
any slot changes: hits are noted first, in the router's order; then misses one by one in the router's order, each
evicting its victim, if no slot is free, before it takes the slot. No expert of the event is ever a victim, and every
miss is admitted. Each layer has its own slots. The cache is cold at the first token and stays as it is between the
sequences of a trace, as it does in a server. A layer that was not computed for a token has no event there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.routing.policies import POLICIES, Event, Policy
from remoe_edge.routing.trace import Trace, reuse_rate


@dataclass(frozen=True)
class Counters:
    """What a cache did: distinct experts of all events, found in a slot or not, and experts that lost their slot."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(self.hits + other.hits, self.misses + other.misses, self.evictions + other.evictions)


@dataclass(frozen=True)
class Simulation:
    """One row of results; rates are between 0 and 1, the reuse rate is None for a trace without two tokens in a row."""

    slots: int
    policy: str
    hit_rate: float
    reuse_rate: float | None
    hits: int
    misses: int
    evictions: int


def simulate(trace: Trace, slots: int, policy: str) -> Simulation:
    """Run ``trace`` through ``slots`` slots per layer under ``policy``, a key of POLICIES.

    Raises RemoeError if the slots cannot hold the experts of one token, or no layer was computed.
    """
    if slots < trace.top_k:
        raise RemoeError(
            f"{slots} slots per layer cannot hold the {trace.top_k} experts of one token; use {trace.top_k} or more"
        )
    total = Counters()
    for layer in range(trace.layers):
        events = layer_events(trace, layer)
        total += simulate_layer(events, slots, POLICIES[policy](events))
    uses = total.hits + total.misses
    if uses == 0:
        raise RemoeError(f"{trace.origin}: no layer was computed for any token; record a decode run")
    return Simulation(
        slots=slots,
        policy=policy,
        hit_rate=total.hits / uses,
        reuse_rate=reuse_rate(trace).total,
        hits=total.hits,
        misses=total.misses,
        evictions=total.evictions,
    )


def layer_events(trace: Trace, layer: int) -> list[Event | None]:
    """The events of one layer, one entry per token; None where the layer was not computed."""
    rows = trace.ids[:, layer].tolist()
    return [tuple(row) if computed else None for row, computed in zip(rows, trace.computed[:, layer], strict=True)]


def simulate_layer(events: Sequence[Event | None], slots: int, policy: Policy) -> Counters:
    """Counters of one layer that starts cold. ``policy`` must be fresh; ``slots`` hold the largest event."""
    resident: set[int] = set()
    hits = misses = evictions = 0
    for time, event in enumerate(events):
        if event is None:
            continue
        found = [expert for expert in event if expert in resident]
        missing = [expert for expert in event if expert not in resident]
        for expert in found:
            policy.use(expert, time)
        for expert in missing:
            if len(resident) == slots:
                resident.remove(policy.victim(resident.difference(event), time))
                evictions += 1
            resident.add(expert)
            policy.use(expert, time)
        hits += len(found)
        misses += len(missing)
    return Counters(hits, misses, evictions)
