import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from small_twin import small_trace, write_small_twin

from remoe_edge.commands.simulate import command
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.routing.policies import POLICIES, Event, Layer
from remoe_edge.routing.simulate import CACHES, layer_events, miss_change, replay_layer, simulate, simulate_layer
from remoe_edge.routing.trace import NOT_COMPUTED, Trace, packaged_trace, save_trace
from remoe_edge.runtime.budget import cache_bytes, expert_groups
from remoe_edge.runtime.llama import POLICIES as RUNTIME_POLICIES

events_strategy = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.permutations(range(8)).map(lambda experts: tuple(experts[:k])), min_size=1, max_size=40)
)


@pytest.mark.parametrize(
    ("policy", "slots", "hits"),
    [
        # Of 38272 uses: 43.4, 59.6, 69.6 and 79.3 %.
        ("lru", 8, 16600),
        ("lru", 16, 22810),
        ("lru", 24, 26642),
        ("lru", 32, 30343),
        # 43.4, 61.9, 73.3 and 82.2 %.
        ("next-use", 16, 24604),
        ("next-use", 24, 28793),
        ("lfu", 8, 16600),
        ("lfu", 16, 23708),
        ("lfu", 24, 28054),
        ("lfu", 32, 31460),
        # 43.4, 72.3, 83.3 and 89.9 %.
        ("belady", 8, 16600),
        ("belady", 16, 27671),
        ("belady", 24, 31880),
        ("belady", 32, 34400),
    ],
)
def test_hits_on_the_packaged_trace(policy: str, slots: int, hits: int) -> None:
    row = simulate(packaged_trace(), slots, policy)
    assert (row.hits, row.misses) == (hits, 299 * 16 * 8 - hits)
    # Every layer fills its slots once, and each later miss evicts.
    assert row.evictions == row.misses - 16 * slots
    assert row.hit_rate == hits / (299 * 16 * 8)
    assert row.reuse_rate == pytest.approx(0.43519, abs=1e-5)


def layer_of(events: list[Event], slots: int) -> Layer:
    experts = max((expert for event in events for expert in event), default=0) + 1
    return Layer(experts, max((len(event) for event in events), default=1), slots, events)


def replay(events: list[Event], slots: int, policy: str) -> list[int]:
    """Hits of each event."""
    # Belady must see the same future in every replay of a part.
    whole = layer_of(events, slots)
    totals = [simulate_layer(replace(whole, events=events[:n]), policy).hits for n in range(len(events) + 1)]
    return np.diff(totals).tolist()


@given(events=events_strategy, extra=st.integers(0, 5), policy=st.sampled_from(sorted(POLICIES)))
def test_hits_are_at_least_the_overlap_with_the_token_before(events: list[Event], extra: int, policy: str) -> None:
    overlaps = [0] + [len(set(now) & set(before)) for before, now in pairwise(events)]
    hits = replay(events, len(events[0]) + extra, policy)
    if extra:
        assert all(hit >= overlap for hit, overlap in zip(hits, overlaps, strict=True))
    else:
        assert hits == overlaps


@given(events=events_strategy, extra=st.integers(0, 5))
def test_no_policy_beats_belady(events: list[Event], extra: int) -> None:
    layer = layer_of(events, len(events[0]) + extra)
    hits = {name: simulate_layer(layer, name).hits for name in POLICIES}
    assert max(hits.values()) == hits["belady"]


def test_lru_order_within_a_token() -> None:
    # At the second token 1 is a hit and 2 a miss, so 1 is older than 2 although the router ranked 2 first.
    events = [(0, 1), (2, 1), (3, 4), (1,)]
    assert simulate_layer(layer_of(events[:3], 3), "lru").evictions == 2
    # The third token evicts 0 for 3, then 1 for 4.
    assert replay(events, 3, "lru")[3] == 0
    assert replay([*events[:3], (2,)], 3, "lru")[3] == 1


def test_decayed_frequency_remembers_evicted_experts() -> None:
    # 3 evicts 0; when 0 is back, its past makes it worth more than 1, so that 6 evicts 1 and 0 is a hit at the end.
    events = [*[(0, 1)] * 4, (2, 3), (4, 0), (5, 6), (0, 7)]
    assert replay(events, 3, "lfu") == [0, 2, 2, 2, 0, 0, 0, 1]


def test_layers_that_were_not_computed_are_no_events() -> None:
    ids = np.full((3, 1, 1), 5, "u2")
    ids[1] = NOT_COMPUTED
    row = simulate(Trace(ids=ids, offs=np.array([0, 3]), meta={"experts": 8}), 1, "lru")
    assert (row.hits, row.misses, row.reuse_rate) == (1, 1, None)
    ids[:] = NOT_COMPUTED
    with pytest.raises(RemoeError, match="no layer was computed"):
        simulate(Trace(ids=ids, offs=np.array([0, 3]), meta={"experts": 8}), 1, "lru")


def test_slots_for_less_than_a_token_are_refused() -> None:
    with pytest.raises(RemoeError, match="7 slots per layer cannot hold the 8 experts of one token; use 8 or more"):
        simulate(packaged_trace(), 7, "lru")


def test_command_prints_rows_as_json() -> None:
    result = CliRunner().invoke(command, ["--slots", "16", "--slots", "24", "--policy", "lru", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [(row["slots"], row["policy"], row["misses"]) for row in rows] == [(16, "lru", 15462), (24, "lru", 11630)]
    assert rows[0]["hit_rate"] == pytest.approx(0.596, abs=5e-4)
    assert rows[0]["reuse_rate"] == pytest.approx(0.435, abs=5e-4)


def test_command_prints_a_table() -> None:
    result = CliRunner().invoke(command, ["--slots", "16"])
    assert result.exit_code == 0
    assert "top 8 of 64 experts, reuse rate 43.5%" in result.stdout
    for cell in ("lru", "59.6%", "lfu", "61.9%", "belady", "72.3%", "22810", "15462"):
        assert cell in result.stdout


def test_command_refuses_an_unknown_policy() -> None:
    result = CliRunner().invoke(command, ["--policy", "fifo"])
    assert result.exit_code == 2
    assert "'fifo' is not one of" in result.stderr


def test_next_use_learns_what_follows_what() -> None:
    # a is followed by 4 + a two tokens later, and a is random: all of 0 to 7 are used equally often.
    rng = random.Random(1)
    events: list[Event | None] = []
    for _ in range(400):
        a = rng.randrange(4)
        events += [(a,), (8,), (4 + a,)]

    def hits(policy: str) -> int:
        return sum(len(found) for found, _, _ in list(replay_layer(Layer(9, 1, 6, events), policy))[600:])

    gap = hits("belady") - hits("lru")
    assert hits("next-use") - hits("lru") > 0.3 * gap
    assert hits("lfu") - hits("lru") < 0.2 * gap


@pytest.mark.parametrize("policy", RUNTIME_POLICIES)
def test_victims_depend_on_the_past_only(policy: str) -> None:
    events = layer_events(packaged_trace(), 8)
    whole, part = (
        [victim for *_, out in replay_layer(Layer(64, 8, 16, known), policy) for victim in out]
        for known in (events, events[:150])
    )
    assert whole[: len(part)] == part


def run_json(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_bytes_and_limits_follow_from_misses() -> None:
    (row,) = run_json(
        *("--slots", "16", "--policy", "lru", "--expert-bytes", "3MB", "--storage-bandwidth", "2GB/s"),
        *("--resident-ms", "40"),
    )
    read = 15462 / 299 * 3e6
    assert row["misses_per_token"] == pytest.approx(15462 / 299)
    assert row["bytes_per_token"] == pytest.approx(read)
    assert row["limit_ms"] == pytest.approx(read / 2e9 * 1e3)
    assert row["no_overlap_ms"] == pytest.approx(40 + read / 2e9 * 1e3)
    (slow,) = run_json(
        *("--slots", "16", "--policy", "lru", "--expert-bytes", "3MB", "--storage-bandwidth", "2GB"),
        *("--resident-ms", "500"),
    )
    assert slow["limit_ms"] == 500


def test_a_budget_becomes_the_slots_of_the_runtime(tmp_path: Path) -> None:
    model, trace = write_small_twin(tmp_path / "small.gguf"), tmp_path / "trace.npz"
    save_trace(small_trace(), trace)
    groups = expert_groups(read_model(model))
    budget = cache_bytes(groups, 7, "lru") + 100
    rows = run_json(str(trace), "--model", str(model), "--budget", str(budget), "--policy", "lru", "--slots", "4")
    assert [row["slots"] for row in rows] == [4, 7]
    assert rows[1]["budget_bytes"] == budget - 100
    assert rows[1]["bytes_per_token"] == pytest.approx(rows[1]["misses_per_token"] * groups[0].expert_bytes)
    result = CliRunner().invoke(command, [str(trace), "--model", str(model), "--budget", "1KiB"])
    assert isinstance(result.exception, RemoeError)
    assert "below the floor of" in str(result.exception)
    result = CliRunner().invoke(command, ["--model", str(model)])
    assert "has 16 layers with top 8 of 64 experts, but" in str(result.exception)


def test_two_traces_are_compared(tmp_path: Path) -> None:
    """Half of the tokens of the second trace repeat the one before: fewer misses, by how many is known."""
    rng = np.random.default_rng(0)
    ids = np.array([[rng.permutation(16)[:2]] for _ in range(400)], np.uint16)
    again = ids.copy()
    again[1::2] = again[::2]
    offs = np.arange(0, 401, 50)
    paths = []
    for name, content in ("base", ids), ("tuned", again):
        paths.append(tmp_path / f"{name}.npz")
        save_trace(Trace(ids=content, offs=offs, meta={"experts": 16}), paths[-1])
    rows = run_json(*map(str, paths), "--slots", "2", "--slots", "4", "--policy", "lru")
    assert [(Path(row["trace"]).name, row["slots"]) for row in rows] == [
        *(("base.npz", 2), ("base.npz", 4)),
        *(("tuned.npz", 2), ("tuned.npz", 4)),
    ]
    for base, tuned in zip(rows[:2], rows[2:], strict=True):
        assert base["misses_change"] is None
        assert tuned["misses_change"] == pytest.approx((1 - tuned["hit_rate"]) / (1 - base["hit_rate"]) - 1)
        low, high = tuned["misses_change_ci95"]
        assert -0.6 < low < tuned["misses_change"] < high < -0.3
    result = CliRunner().invoke(command, [*map(str, paths), "--slots", "4"])
    assert "misses change" in result.stdout
    # One sequence is no sample.
    alone = Trace(ids=ids, offs=np.array([0, 400]), meta={"experts": 16})
    pair = [simulate(each, 4, "lru") for each in (alone, replace(alone, ids=again))]
    assert miss_change(*pair).ci95 is None


def test_cold_caches_miss_more() -> None:
    parts = replace(packaged_trace(), offs=np.array([0, 100, 200, 299]))
    for policy in POLICIES:
        warm, cold = (simulate(parts, 16, policy, cache=cache) for cache in CACHES)
        assert cold.misses > warm.misses
        assert cold.evictions == cold.misses - 3 * 16 * 16


def test_layers_and_plot(tmp_path: Path) -> None:
    plot = tmp_path / "misses.png"
    arguments = ["--slots", "8", "--slots", "16", "--per-layer", "--plot", str(plot)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    rows = run_json("--slots", "8", "--slots", "16")
    table = result.stdout.partition("hit rate per layer")[2]
    assert f"{rows[0]['layer_hit_rate'][15] * 100:.1f}" in table
    mean = np.mean([row["layer_hit_rate"] for row in rows], axis=1)
    assert mean == pytest.approx([row["hit_rate"] for row in rows])
    assert plot.read_bytes().startswith(b"\x89PNG")
    first = plot.read_bytes()
    result = CliRunner().invoke(command, arguments)
    assert "exists; pass --force" in str(result.exception)
    timed = ["--expert-bytes", "1MB", "--storage-bandwidth", "1GB", "--resident-ms", "5", "--force"]
    assert CliRunner().invoke(command, [*arguments, *timed]).exit_code == 0
    assert plot.read_bytes() != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "1GB"], "--budget needs the size of an expert"),
        (["--resident-ms", "3"], "--resident-ms has no effect without --model"),
        (["--expert-bytes", "1MB", "--resident-ms", "3"], "needs both --storage-bandwidth and --resident-ms"),
        (["--force"], "--force has no effect without --plot"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(command, flags)
    assert result.exit_code == 2
    assert message in result.stderr
