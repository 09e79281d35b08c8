"""The compiled simulator does what the Python policies say, evicted expert by evicted expert."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.routing import native, simulate
from remoe_edge.routing.policies import POLICIES, Layer
from remoe_edge.routing.simulate import CACHES, layer_events, replay_layer, simulate_all
from remoe_edge.routing.trace import NOT_COMPUTED, Trace, packaged_trace


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Up to 100 tokens in up to 4 sequences, some of them empty; skewed routing, layers that were not computed."""
    experts = draw(st.integers(2, 20))
    top_k = draw(st.integers(1, min(5, experts)))
    layers = draw(st.integers(1, 2))
    offs = np.array([0, *np.cumsum(draw(st.lists(st.integers(0, 25), min_size=1, max_size=4))), 0])[:-1]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = max(int(offs[-1]), 1)
    offs[-1] = tokens
    weights = rng.dirichlet(np.full(experts, draw(st.sampled_from([0.3, 1.0, 10.0])))) + 1e-9
    ids = np.array(
        [
            [rng.choice(experts, top_k, replace=False, p=weights / weights.sum()) for _ in range(layers)]
            for _ in range(tokens)
        ],
        np.uint16,
    )
    ids[rng.random((tokens, layers)) < draw(st.sampled_from([0.0, 0.3]))] = NOT_COMPUTED
    ids[-1, 0] = range(top_k)
    return Trace(ids=ids, offs=offs.astype(np.int64), meta={"experts": experts})


@settings(deadline=None)
@given(trace=traces(), more=st.integers(0, 8), policy=st.sampled_from(sorted(POLICIES)), cold=st.booleans())
def test_victims_are_those_of_the_reference(trace: Trace, more: int, policy: str, cold: bool) -> None:
    slots = min(trace.top_k + more, trace.experts)
    for layer in range(trace.layers):
        events = layer_events(trace, layer)
        spans = pairwise(trace.offs.tolist()) if cold else [(0, trace.tokens)]
        expected = [
            victim
            for begin, end in spans
            for *_, out in replay_layer(Layer(trace.experts, trace.top_k, slots, events[begin:end]), policy)
            for victim in out
        ]
        victims = np.full(trace.tokens * trace.top_k, NOT_COMPUTED, np.uint16)
        ids = np.ascontiguousarray(trace.ids[:, layer])
        counters = native.replay(
            policy, ids, trace.offs, experts=trace.experts, slots=slots, cold=cold, victims=victims
        )
        assert victims[: counters[:, 2].sum()].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(trace=traces(), more=st.integers(0, 8), cache=st.sampled_from(CACHES))
def test_counters_of_every_sequence_are_those_of_the_reference(trace: Trace, more: int, cache: str) -> None:
    runs = [(trace.top_k + more, policy) for policy in POLICIES]
    compiled = simulate_all(trace, runs, cache=cache)
    for row, (slots, policy) in zip(compiled, runs, strict=True):
        for layer in range(trace.layers):
            ids = np.ascontiguousarray(trace.ids[:, layer])
            expected = simulate._reference(trace, ids, min(slots, trace.experts), policy, cache == "cold")
            assert row.counters[layer].tolist() == expected.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_real_routing(policy: str) -> None:
    """Long enough for every part of next-use: full horizons, learned pairs, falling rates."""
    trace = packaged_trace()
    for slots in (8, 12, 24, 64):
        ids = np.ascontiguousarray(trace.ids[:, 3], np.uint16)
        victims = np.empty(ids.size, np.uint16)
        counters = native.replay(policy, ids, trace.offs, experts=64, slots=slots, cold=False, victims=victims)
        steps = list(replay_layer(Layer(64, 8, slots, layer_events(trace, 3)), policy))
        assert victims[: counters[0, 2]].tolist() == [victim for *_, out in steps for victim in out]
        assert counters[0].tolist() == [sum(map(len, part)) for part in zip(*steps, strict=True)]


def test_cold_is_each_sequence_alone() -> None:
    trace = packaged_trace()
    parts = Trace(ids=trace.ids, offs=np.array([0, 100, 299]), meta=trace.meta)
    runs = [(16, policy) for policy in POLICIES]
    alone = [
        simulate_all(Trace(ids=trace.ids[begin:end], offs=np.array([0, end - begin]), meta=trace.meta), runs)
        for begin, end in pairwise(parts.offs.tolist())
    ]
    for row, first, second in zip(simulate_all(parts, runs, cache="cold"), *alone, strict=True):
        assert row.misses == first.misses + second.misses
    for row, whole in zip(simulate_all(parts, runs, cache="carried"), simulate_all(trace, runs), strict=True):
        assert row.misses == whole.misses


def test_without_a_compiler_python_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = simulate_all(packaged_trace(), [(16, "lru"), (16, "belady")])
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    native._library.cache_clear()
    said = []
    try:
        rows = simulate_all(packaged_trace(), [(16, "lru"), (16, "belady")], report=lambda what, _: said.append(what))
    finally:
        native._library.cache_clear()
    assert [row.row() for row in rows] == [row.row() for row in expected]
    assert "in Python (no C compiler found; " in said[0]


def test_what_was_compiled_is_kept_and_broken_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path))
    native._library.cache_clear()
    try:
        native.prepare()
        (kept,) = (tmp_path / "simulator").iterdir()
        before = kept.stat().st_mtime_ns
        native._library.cache_clear()
        native.prepare()
        assert kept.stat().st_mtime_ns == before
        broken = tmp_path / "broken"
        monkeypatch.setenv("REMOE_EDGE_CACHE", str(broken))
        (broken / "simulator").mkdir(parents=True)
        (broken / "simulator" / kept.name).write_bytes(b"no library")
        native._library.cache_clear()
        with pytest.raises(RemoeError, match=rf"{kept.name}: cannot be loaded"):
            native.prepare()
    finally:
        native._library.cache_clear()
