"""An expert cache in miniature: what hits a routing trace gives with a number of slots and a policy.

The cache is event-atomic, as the runtime's is. An event is one token in one layer. All its experts are looked up before
any slot changes, and the policy is told: hits first, then misses, each in the router's order. Then each miss in turn
evicts its victim, if no slot is free, and takes the slot. No expert of the event is ever a victim, and every
miss is admitted. Each layer has its own slots. The cache is cold at the first token and stays as it is between the
sequences of a trace, as it does in a server. A layer that was not computed for a token has no event there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.routing.policies import POLICIES, Event, Layer
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
        total += simulate_layer(Layer(trace.experts, trace.top_k, slots, layer_events(trace, layer)), policy)
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
