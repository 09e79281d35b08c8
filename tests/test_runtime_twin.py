"""The packaged trace through the real cache: it visits what was traced, and counts what the simulator counts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from remoe_edge.routing.simulate import simulate
from remoe_edge.routing.trace import load_trace, packaged_trace
from remoe_edge.routing.twin import plan_twin, step_token, write_twin
from remoe_edge.runtime.llama import CacheConfig, Session, open_model

pytestmark = [pytest.mark.runtime, pytest.mark.timeout(1200)]

STEPS = 299
THREADS = 2


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers and experts of the trace, in narrow layers."""
    path = tmp_path_factory.mktemp("twin") / "olmoe.gguf"
    write_twin(plan_twin(packaged_trace(), hidden=1024, ff=32), path)
    return path


def walk(session: Session) -> Iterator[int]:
    """Decode the whole trace from its first step; the tokens chosen greedily."""
    token = step_token(0)
    for _ in range(STEPS):
        session.decode([token])
        token = int(session.logits().argmax())
        yield token


@pytest.mark.parametrize("io", ["direct", "mmap"])
@pytest.mark.parametrize(
    ("policy", "slots", "least", "most"),
    [
        ("lru", 16, 59.6, 60.0),
        ("lru", 24, 69.6, 69.6),
        ("next-use", 16, 64.3, 64.3),
        ("next-use", 24, 75.2, 75.2),
        ("lfu", 16, 61.9, 61.9),
        ("lfu", 24, 73.3, 73.3),
        ("lru", 8, 43.4, 43.4),
        ("lfu", 8, 43.4, 43.4),
    ],
)
def test_counters_are_those_of_the_simulator(
    twin: Path, tmp_path: Path, io: str, policy: str, slots: int, least: float, most: float
) -> None:
    trace = packaged_trace()
    recorded = tmp_path / "trace.npz"
    with open_model(twin, CacheConfig(f"{slots}s", policy, io), n_threads=THREADS) as session:
        session.trace_start(recorded)
        assert list(walk(session)) == [step_token((step + 1) % STEPS) for step in range(STEPS)]
        session.trace_stop()
        stats, info = session.stats(), session.info()
        layers = [session.stats(layer) for layer in range(trace.layers)]
    assert stats
    assert info

    # Token by token, layer by layer, expert by expert.
    assert (load_trace(recorded).ids == trace.ids).all()

    expected = simulate(trace, slots, policy)
    assert (stats.hits, stats.misses, stats.evictions) == (expected.hits, expected.misses, expected.evictions)
    assert least <= round(100 * stats.hits / (stats.hits + stats.misses), 1) <= most
    assert stats.calls == STEPS * trace.layers
    assert stats.calls_streamed == 0
    assert stats.reads == 3 * stats.misses
    assert stats.bytes_demand == stats.misses * info.expert_bytes // (trace.layers * trace.experts)
    assert sum(layer.hits for layer in layers if layer) == stats.hits


@pytest.mark.parametrize("slots", [8, 16])
def test_reading_ahead_reads_what_is_needed(twin: Path, slots: int) -> None:
    """In a twin the residual stream hardly changes, so the next layer's router says now what it will say then."""
    with open_model(twin, CacheConfig(f"{slots}s", prefetch="router"), n_threads=THREADS) as session:
        steps = walk(session)
        # The first token finds free slots.
        assert next(steps) == step_token(1)
        session.reset_stats()
        assert list(steps) == [step_token((step + 1) % STEPS) for step in range(1, STEPS)]
        stats = session.stats()
    assert stats
    if slots == 8:
        assert stats.bytes_prefetch == 0, "all slots belong to the experts of the last token"
    else:
        assert stats.hits_prefetch > 0
        assert stats.bytes_prefetch_used > 0.99 * stats.bytes_prefetch > 0


def test_trace_recorded_without_the_cache(twin: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "trace.npz"
    with open_model(twin, n_threads=THREADS) as session:
        session.trace_start(recorded)
        for _ in walk(session):
            pass
        session.trace_stop()
    trace = load_trace(recorded)
    assert (trace.ids == packaged_trace().ids).all()
    assert trace.offs.tolist() == [0, STEPS]
    assert trace.meta["experts"] == 64


def test_hits_are_at_least_what_the_last_token_shares(twin: Path) -> None:
    """The lemma on real routing: C >= K implies hits[t] >= |E[t] n E[t-1]|, equality at C = K."""
    ids = packaged_trace().ids
    for slots in (8, 11):
        with open_model(twin, CacheConfig(f"{slots}s"), n_threads=THREADS) as session:
            before = np.zeros(ids.shape[1], dtype=int)
            token = step_token(0)
            for step in range(60):
                session.decode([token])
                token = int(session.logits().argmax())
                for layer in range(ids.shape[1]):
                    stats = session.stats(layer)
                    assert stats
                    hits = stats.hits - before[layer]
                    before[layer] = stats.hits
                    shared = len(np.intersect1d(ids[step, layer], ids[step - 1, layer])) if step else 0
                    assert hits == shared if slots == 8 else hits >= shared
