"""The benchmark matrix: what is planned and refused, rows of rounds, limits, going on after a stop, table and plot."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_twin import EXPERTS, LAYERS, TOP_K, small_trace, write_small_twin

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure import matrix
from remoe_edge.measure.matrix import (
    HEADROOM_BYTES,
    TWINS,
    Engine,
    Settings,
    Sizes,
    TwinSpec,
    add_limits,
    engines,
    measure_twin,
    merge_rounds,
    model_sizes,
    prepare_twin,
)
from remoe_edge.measure.matrix_report import markdown_table, write_plot
from remoe_edge.routing.simulate import simulate
from remoe_edge.routing.trace import excerpt, packaged_trace, save_trace

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_matrix.py"
SIZES = Sizes(layers=2, experts=32, top_k=4, slot_bytes=1000, dense_bytes=50, file_bytes=32_100)
SETTINGS = Settings(n_threads=2, read_modes=("direct",), prefetches=("off",), n_gen=12, n_gen_mmap=4, repetitions=2)


def row(engine: Engine, **changes: Any) -> dict[str, Any]:
    return {
        "twin": "t",
        "engine": engine.label,
        "arm": engine.arm,
        "status": "ok",
        "reason": None,
        "slots": engine.slots,
        "cache_fraction": None if engine.slots is None else engine.slots / 32,
        "repack": engine.repack,
        "policy": engine.policy,
        "read_mode": engine.read_mode,
        "tpot_ms": 100.0,
        "repetitions": 1,
        "peak_memory_bytes": 10,
        "output_sha256": "o",
        "logits_sha256": "l",
        "needed_bytes_per_token": 4e8 if engine.arm == "cache" else None,
        "bytes_per_token": 4e8,
        "storage_bytes_per_s": 2e9,
        "round": 0,
        "seconds": 1.0,
        "layers": 2,
        "experts": 32,
        "top_k": 4,
        "model_size": 5,
        "n_threads": 2,
        "page_cache": "dropped",
        "n_gen": 64,
        "budget_bytes": 1,
        "memory_limit_bytes": 2,
        "hit_rate": 0.5,
        "stall_ms_per_token": 1.0,
        **changes,
    }


def test_engines_cover_the_matrix() -> None:
    planned = engines(SIZES, Settings(n_threads=1))
    assert len(planned) == len({engine.label for engine in planned}) == 2 + 5 + 4 * 6 * 2 + 2
    assert {engine.slots for engine in planned if engine.arm == "cache"} == {4, 8, 12, 16, 32}
    assert {engine.slots for engine in planned if engine.arm == "mmap"} == {4, 8, 12, 16, 32}
    assert [engine.policy for engine in planned if engine.slots == 32 and engine.arm == "cache"] == [
        "next-use",
        "next-use",
    ]


def test_real_twins_fit_in_6_gib() -> None:
    for spec in TWINS:
        experts, blocks = {"olmoe": (64, 18), "deepseek2": (64, 18), "gpt-oss": (32, 17)}[spec.arch]
        assert spec.layers * experts <= spec.hidden
        assert 3e9 < spec.layers * experts * 3 * spec.hidden * spec.ff // 32 * blocks < 6e9


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_small_twin(tmp_path / "t.gguf")
    sizes = model_sizes(path)
    assert (sizes.layers, sizes.experts, sizes.top_k) == (LAYERS, EXPERTS, TOP_K)
    assert sizes.slot_bytes == LAYERS * 3 * 256 * 256 // 32 * 18
    tensors = sum(tensor.nbytes for tensor in read_model(path)[0].tensors.values())
    assert sizes.dense_bytes == tensors - EXPERTS * sizes.slot_bytes
    assert sizes.limit(5) == 5 * sizes.slot_bytes + sizes.dense_bytes + HEADROOM_BYTES


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=7), st.integers(0, 3))
def test_rounds_become_medians(tpots: list[float], odd: int) -> None:
    engine = Engine("cache", 8, "lfu", "direct")
    rounds = [row(engine, tpot_ms=tpot, round=i, peak_memory_bytes=i) for i, tpot in enumerate(tpots)]
    for other in rounds[:odd]:
        other["logits_sha256"] = "other"
    merged = merge_rounds(rounds)
    assert merged["tpot_ms"] == pytest.approx(np.median(tpots))
    assert merged["tpot_ms_rounds"] == tpots
    assert merged["repetitions"] == len(tpots)
    assert merged["peak_memory_bytes"] == len(tpots) - 1
    assert merged["output_sha256"] == "o"
    assert (merged["logits_sha256"] is None) == (0 < odd < len(tpots))
    if len(tpots) == 1:
        assert merged["tpot_ms_ci95"] is None
    else:
        low, high = merged["tpot_ms_ci95"]
        assert min(tpots) - 1e-6 <= low <= high <= max(tpots) + 1e-6
    assert not {"round", "seconds"} & merged.keys()


def test_an_engine_that_failed_once_has_failed() -> None:
    engine = Engine("mmap", 8)
    merged = merge_rounds([row(engine), row(engine, status="killed", reason="out of memory")])
    assert (merged["status"], merged["reason"]) == ("killed", "out of memory")


def test_limits_are_the_larger_of_compute_and_reads() -> None:
    rows = [
        row(Engine("resident"), tpot_ms=50.0, storage_bytes_per_s=2e9),
        row(Engine("resident", repack=True), tpot_ms=20.0, storage_bytes_per_s=None),
        row(Engine("mmap", 8), tpot_ms=900.0, storage_bytes_per_s=1e9),
        row(Engine("cache", 8, "lfu", "direct"), tpot_ms=300.0, storage_bytes_per_s=4e9),
        row(Engine("cache", 16, "lfu", "direct"), tpot_ms=75.0, needed_bytes_per_token=2e7),
        row(Engine("cache", 2, "lfu", "direct"), status="refused", tpot_ms=None),
    ]
    add_limits(rows)
    # 4e8 bytes at the median speed, 2 GB/s; 2e7 bytes take less than computing does.
    assert [r["limit_ms"] for r in rows] == [50.0, None, None, pytest.approx(200.0), 50.0, None]
    assert [r["limit_ratio"] for r in rows] == [1.0, None, None, pytest.approx(1.5), 1.5, None]
    without = [r for r in rows if r["arm"] != "resident"]
    add_limits(without)
    assert {r["limit_ms"] for r in without} == {None}


def test_table_shows_every_engine_and_why_some_have_no_number() -> None:
    rows = [
        row(Engine("resident")),
        row(Engine("cache", 8, "lfu", "direct")),
        row(Engine("cache", 16, "lfu", "direct"), logits_sha256="x"),
        row(Engine("mmap", 8), n_gen=16),
        row(Engine("cache", 2, "lru", "mmap"), status="refused", reason="below the floor of 300 MiB", tpot_ms=None),
    ]
    rows = [merge_rounds([each]) for each in rows]
    add_limits(rows)
    lines = markdown_table(rows).splitlines()
    cells = {line.split("|")[1].strip() + line.split("|")[2].strip(): line for line in lines if line.startswith("|")}
    assert "| 100.0 | 200.0 | 0.50 | 50.0% | 400.0 | 1.0 | 10 B | = resident |" in cells["cache lfu direct8/32"]
    assert cells["cache lfu direct16/32"].endswith("| DIFFERS |")
    # Runs of another length end with other logits; they are not held against each other.
    assert cells["mmap8/32"].endswith("| - |")
    assert "| refused |" in cells["cache 2s lru mmap2/32"]
    assert "- cache 2s lru mmap refused: below the floor of 300 MiB" in lines
    assert "A run cannot beat the limit: the machine was not quiet, measure again." in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_plot_of_what_there_is(tmp_path: Path) -> None:
    refused = row(Engine("cache", 2, "lru", "mmap"), status="refused", tpot_ms=None, tpot_ms_ci95=None)
    rows = [merge_rounds([row(Engine("cache", n, "lfu", "direct"))]) for n in (8, 16)]
    rows += [merge_rounds([row(Engine("resident"))]), refused, {**refused, "twin": "nothing measured"}]
    add_limits(rows)
    write_plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_twin_is_written_once(tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "small.npz")
    spec = TwinSpec("small", "small.npz", "olmoe", 256, 256, "Q4_0", layers=2, tokens=10)
    path = prepare_twin(spec, tmp_path, tmp_path / "twins")
    assert read_model(path)[0].integer("remoe.twin.steps") == 10
    assert model_sizes(path).layers == 2
    written = path.stat().st_mtime_ns
    assert prepare_twin(spec, tmp_path, tmp_path / "twins") == path
    assert path.stat().st_mtime_ns == written
    assert prepare_twin(replace(spec, layers=1), tmp_path, tmp_path / "twins") != path
    with pytest.raises(RemoeError, match=r"the twin of small needs a trace; .* small\.npz with --traces"):
        prepare_twin(spec, None, tmp_path / "twins")


def test_what_does_not_fit_into_memory_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_small_twin(tmp_path / "t.gguf")
    monkeypatch.setattr(matrix, "_available_memory", lambda: 1000)
    monkeypatch.setattr(matrix, "engines", lambda *_: [Engine("resident"), Engine("cache", 4, "lfu", "direct")])
    rows = measure_twin("small", path, SETTINGS, tmp_path / "j.jsonl")
    assert [r["status"] for r in rows] == ["refused", "refused"]
    assert rows[0]["reason"].endswith("of memory, 1000 B are available")
    assert "refused" in markdown_table(rows)


SLOTS = {Fraction(1, 16): 1, Fraction(1, 4): 4, Fraction(1): 16}


@pytest.mark.runtime
def test_a_small_matrix(tmp_path: Path) -> None:
    """Every engine of a real matrix: numbers, the refused budget, the simulator's hit rates, and going on."""
    path = write_small_twin(tmp_path / "t.gguf")
    journal = tmp_path / "j.jsonl"
    settings = replace(SETTINGS, fractions=tuple(SLOTS))
    seen: list[tuple[str, float | None]] = []
    rows = measure_twin("small", path, settings, journal, lambda stage, part: seen.append((stage, part)))
    by_engine = {r["engine"]: r for r in rows}
    assert len(rows) == 2 + 3 + 3 + 3 + 1
    refused = [name for name, r in by_engine.items() if r["status"] != "ok"]
    assert refused == ["cache 1s next-use direct", "cache 1s lfu direct", "cache 1s lru direct"]
    assert by_engine[refused[0]]["status"] == "refused"
    assert "below the floor of this model" in by_engine[refused[0]]["reason"]

    resident = by_engine["resident"]
    for name, r in by_engine.items():
        if r["arm"] == "cache" and r["status"] == "ok":
            assert r["logits_sha256"] == resident["logits_sha256"], name
            assert (r["policy"], r["read_mode"]) == (name.split()[2], "direct")
            assert r["limit_ms"] >= resident["tpot_ms"]
            assert r["repetitions"] == len(r["tpot_ms_rounds"]) == 2
            # The first token is prefill: the rest walks from the second step on, with its experts in the cache.
            trace = excerpt(small_trace(), tokens=settings.n_gen)
            first = excerpt(small_trace(), tokens=1)
            both = [simulate(t, r["slots"], r["policy"]) for t in (trace, first)]
            hits, misses = (getattr(both[0], key) - getattr(both[1], key) for key in ("hits", "misses"))
            # Where all experts fit they are there before the first call.
            assert r["hit_rate"] == (1.0 if r["slots"] == 16 else pytest.approx(hits / (hits + misses)))
    assert by_engine["mmap 4s"]["n_gen"] == 4
    if by_engine["mmap 4s"]["memory_limit_bytes"] is not None:
        assert by_engine["mmap 4s"]["memory_limit_bytes"] == model_sizes(path).limit(4)
    parts = [part for _, part in seen]
    assert parts == sorted(parts)
    assert any("min left" in stage for stage, _ in seen)

    # Rounds alternate in direction.
    entries = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    first_round = [entry["engine"] for entry in entries if entry["round"] == 0]
    second_round = [entry["engine"] for entry in entries if entry["round"] == 1]
    assert second_round == [name for name in reversed(first_round) if name not in refused]

    # Cut off in the middle of a line, the matrix makes what is missing, and no more.
    content = journal.read_bytes()
    journal.write_bytes(content[:-40])
    again = measure_twin("small", path, settings, journal)
    assert journal.read_bytes().splitlines()[:-1] == content.splitlines()[:-1]
    assert [r["engine"] for r in again] == [r["engine"] for r in rows]
    with pytest.raises(RemoeError, match=r"j\.jsonl: holds runs with another n_gen; choose another folder"):
        measure_twin("small", path, replace(settings, n_gen=13), journal)
    write_plot(rows, tmp_path / "p.png")
    assert markdown_table(rows).count("= resident") == 5


@pytest.mark.runtime
def test_the_script_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "-o", str(tmp_path / "out"), "--twins", str(tmp_path / "twins")]
    command += ["--quick", "--layers", "1", "-n", "4", "-t", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        journal = tmp_path / "out" / "olmoe-1b-7b.runs.jsonl"
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert "Leaving out gpt-oss-20b: no gpt-oss-20b.npz; name its folder with --traces." in errors
    kept = journal.read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["engine"], r["status"]) for r in rows] == [
        (name, "ok")
        for name in (
            *(
                "resident",
                "resident repacked",
                "mmap 8s",
                "cache 8s next-use direct",
                "mmap 16s",
                "cache 16s next-use direct",
            ),
            *("mmap 24s", "cache 24s next-use direct", "mmap 32s", "cache 32s next-use direct", "mmap 64s"),
            "cache 64s next-use direct",
        )
    ]
    assert done.stdout.strip() == (tmp_path / "out" / "results.md").read_text().strip()
    assert (tmp_path / "out" / "tpot.png").exists()
    assert not list((tmp_path / "out").glob(".*"))
    steps = read_model(next((tmp_path / "twins").iterdir()))[0].integer("remoe.twin.steps")
    assert steps == 128 < packaged_trace().tokens
