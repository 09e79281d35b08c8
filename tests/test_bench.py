import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_router import merge_rare_experts, write_changed_router
from click.testing import CliRunner
from fake_jetson import VDD_IN_WATTS, orin_nx
from records import MS, RUN, STOCK, record, stats
from small_twin import EXPERTS, LAYERS, small_trace, write_small_twin

from remoe_edge.cli import cli
from remoe_edge.commands.demo import free_folder
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure import bench as bench_module
from remoe_edge.measure.arms import Arm, Options, plan_arms, schedule
from remoe_edge.measure.bench import bench, fingerprint
from remoe_edge.measure.cgroup import CgroupUnavailableError, memory_group
from remoe_edge.measure.demo import check_identical
from remoe_edge.measure.rows import Row, add_limits, summarize, tpot_ns
from remoe_edge.measure.watch import Watch
from remoe_edge.measure.worker import DecodeFailedError, Job, LayerCounters, decode_in_process
from remoe_edge.measure.workloads import Prompt, Workload, single_prompt
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig

# scripts/compare-llama-bench.py refuses rows without these.
COMPARED = set(
    re.findall(
        r"\w+",
        """
        build_commit test_time avg_ts cpu_info gpu_info backends n_gpu_layers n_cpu_moe tensor_buft_overrides
        model_filename model_type n_batch n_ubatch embeddings cpu_mask cpu_strict poll n_threads type_k type_v load_mode
        no_kv_offload split_mode main_gpu tensor_split flash_attn n_prompt n_gen n_depth fit_target fit_min_ctx
        """,
    )
)
OURS = set(
    re.findall(
        r"\w+",
        """
        arm model_path budget_bytes policy read_mode n_gen ttft_ms tpot_ms tpot_ms_ci95 itl_ms_p50 itl_ms_p95 itl_ms_p99
        hit_rate bytes_per_token demand_bytes_per_token stall_ms_per_token peak_memory_bytes storage_bytes_per_s
        limit_ms limit_ratio joules_per_token output_sha256
        """,
    )
)


def test_tpot_leaves_out_the_first_token() -> None:
    assert tpot_ns([5, 15, 35]) == 15


def test_a_row_of_one_run() -> None:
    row = summarize([record(RUN)])
    expected = {
        "ttft_ms": 100,
        "tpot_ms": 20,
        "tpot_ms_ci95": None,
        "itl_ms_p50": 10,
        "itl_ms_p95": pytest.approx(44),
        "itl_ms_mean": 20,
        "hit_rate": 0.75,
        "bytes_per_token": 1000,
        "demand_bytes_per_token": 1000,
        "storage_bytes_per_token": 1024,
        "stall_ms_per_token": 2,
        "major_faults_per_token": 1,
        "itl_ms_max": 50,
        "tokens_per_s": 50,
        "timer_overhead": pytest.approx(1e-5),
        "pause_ms_per_token": 1,
        "layer_hit_rate": [1, 0.5, None],
        "peak_memory_bytes": 7,
        "budget_bytes": 1000,
        "n_slots": 4,
        "policy": "lfu",
        "read_mode": "direct",
        "output_sha256": "a",
    }
    assert {key: row[key] for key in expected} == expected


def test_forecasts_are_summed_over_runs() -> None:
    assert RUN.decode is not None
    none = summarize([record(RUN)])
    names = ["forecast_precision", "forecast_recall", "layer_forecast_precision", "forecasts_read_share", "forecast_us"]
    assert [none[name] for name in names] == [None] * 5
    counted = replace(
        RUN.decode,
        forecasts=10,
        forecasts_read=4,
        forecast_experts=20,
        forecast_used=12,
        forecast_needed=16,
        forecast_ns=30_000,
    )
    layers = LayerCounters([1, 2, 3], [0, 2, 0], [0, 15, 5], [0, 8, 4])
    run = replace(RUN, decode=counted, layers=layers)
    row = summarize([record(run), record(replace(run, decode=replace(counted, forecast_used=6)), repetition=1)])
    assert [row[name] for name in names] == [18 / 40, 18 / 32, [None, 16 / 30, 8 / 10], 0.4, 3.0]


def test_repetitions_are_summed_and_their_median_is_taken() -> None:
    slower = replace(RUN, token_ns=[time * 2 for time in RUN.token_ns], decode=stats(10, 30, 8000, 0))
    slowest = replace(RUN, token_ns=[time * 4 for time in RUN.token_ns])
    runs = [record(run, repetition=index, peak=7 + index) for index, run in enumerate((RUN, slowest, slower))]
    row = summarize(runs)
    assert row["tpot_ms"] == 40
    assert row["tpot_ms_mean"] == pytest.approx(140 / 3)
    assert row["hit_rate"] == pytest.approx(70 / 120)
    assert row["bytes_per_token"] == pytest.approx(16000 / 12)
    assert row["peak_memory_bytes"] == 9
    assert row["tpot_ms_ci95"] == [20, 80]
    assert summarize([record(RUN), record(replace(RUN, output_sha256="c"), repetition=1)])["output_sha256"] is None


def test_a_repetition_is_the_mean_over_its_prompts() -> None:
    slow = replace(RUN, token_ns=[time * 2 for time in RUN.token_ns], output_sha256="c")
    runs = [record(run, prompt=prompt, repetition=r) for r in range(2) for prompt, run in enumerate((RUN, slow))]
    row = summarize(runs)
    assert row["tpot_ms"] == 30
    assert row["tpot_ms_ci95"] == [30, 30]
    assert len(row["output_sha256"]) == 64
    assert row["output_sha256"] != summarize(runs[:1])["output_sha256"]


def test_without_a_cache_bytes_are_those_the_kernel_fetched() -> None:
    row = summarize([record(STOCK)])
    assert (row["hit_rate"], row["bytes_per_token"], row["demand_bytes_per_token"]) == (None, 1024, None)
    assert row["layer_hit_rate"] is None
    assert summarize([record(replace(STOCK, read_bytes=None))])["bytes_per_token"] is None


def test_tokens_have_their_places_on_the_clock_that_power_is_sampled_on() -> None:
    # The clock of token_ns stands still 1 ms after each token.
    assert RUN.moments_ns == [time * MS for time in (1100, 1111, 1122, 1133, 1184)]


def row_of(arm: str, tpot_ms: float | None, **fields: Any) -> Row:
    row = {
        "model_path": "m.gguf",
        "arm": arm,
        "budget": None,
        "tpot_ms": tpot_ms,
        "tpot_ms_ci95": None,
        "kernels": "plain",
        "repack": False,
        "budget_bytes": None,
        "bytes_per_token": 1e6,
        "demand_bytes_per_token": None,
        "storage_bytes_per_s": 1e9,
        "limit_ms": None,
        "limit_ratio": None,
        "status": "ok",
        "reason": None,
        "output_sha256": "a",
        "logits_sha256": "b",
    }
    return row | fields


def limits(rows: list[Row]) -> list[tuple[float | None, float | None]]:
    add_limits(rows)
    return [(row["limit_ms"], row["limit_ratio"]) for row in rows]


def test_the_limit_is_compute_or_storage_whichever_takes_longer() -> None:
    rows = [
        row_of("cache", 60.0, needed_bytes_per_token=10e6),
        row_of("cache", 60.0, needed_bytes_per_token=40e6),
        row_of("mmap", 900.0),
        row_of("resident", 20.0),
        row_of("resident", 15.0, repack=True),
        row_of("cache", None),
    ]
    assert limits(rows) == [(20, 3), (40, 1.5), (None, None), (20, 1), (15, 1), (None, None)]


def test_without_a_resident_run_there_is_no_limit() -> None:
    other = row_of("resident", 20.0, model_path="other.gguf")
    assert limits([row_of("cache", 60.0, needed_bytes_per_token=1e6), other])[0] == (None, None)


def options(*models: Path, **fields: Any) -> Options:
    workload = single_prompt("w00000w00001w00002")
    defaults: dict[str, Any] = {"workload": workload, "n_gen": 12, "n_threads": 1, "cool_down_s": 0}
    return Options(models=models, **(defaults | fields))


def test_arms_of_all_models() -> None:
    a, b = Path("a"), Path("b")
    wanted = options(a, b, budgets=("8s", "8s"), baselines=("mmap", "resident"), repack=True, policies=("lru", "lfu"))
    arms = [
        {"name": "cache", "budget": "8s", "policy": "lru", "repack": True},
        {"name": "cache", "budget": "8s", "policy": "lfu", "repack": True},
        {"name": "mmap"},
        {"name": "resident", "repack": True},
    ]
    assert plan_arms(wanted) == [Arm(model=model, **fields) for model in (a, b) for fields in arms]


def test_arms_take_turns_and_every_other_time_in_reverse() -> None:
    turns = list(schedule(2, 2, 2))
    assert [(turn.arm, turn.prompt, turn.repetition) for turn in turns] == [
        *((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)),
        *((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)),
    ]
    assert len(set(schedule(3, 5, 7))) == 3 * 5 * 7


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("bench") / "twin.gguf")


def test_the_fingerprint_tells_models_apart(twin: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    data = bytearray(twin.read_bytes())
    copy.write_bytes(data)
    assert fingerprint(read_model(copy)) == fingerprint(read_model(twin))
    data[100] ^= 1
    layouts = read_model(copy)
    copy.write_bytes(data)
    assert fingerprint(layouts) != fingerprint(read_model(twin))


def test_rare_experts_hand_their_tokens_to_frequent_ones() -> None:
    router = np.eye(4, dtype=np.float32)
    changed = merge_rare_experts(router, np.array([5, 1, 9, 3]), 1)
    token = router[1]
    assert (changed @ token).tolist() == [0, -1, 1, 0]
    assert np.array_equal(router, np.eye(4))


def test_a_changed_router_fits_its_model(twin: Path, tmp_path: Path) -> None:
    router, tuned = tmp_path / "router.safetensors", tmp_path / "tuned.gguf"
    write_changed_router(twin, small_trace(), router)
    assert len(convert(twin, router, tuned).replacements) == LAYERS


def test_outputs_that_differ_are_an_error() -> None:
    rows = [row_of("cache", 1.0, budget="8s"), row_of("mmap", 1.0)]
    check_identical(rows)
    check_identical([*rows, row_of("mmap", 1.0, model_path="other.gguf", output_sha256="z")])
    with pytest.raises(RemoeError, match=r"m\.gguf, mmap: its output differs"):
        check_identical([rows[0], row_of("mmap", 1.0, logits_sha256="z")])
    with pytest.raises(RemoeError, match=r"m\.gguf, mmap: killed: why"):
        check_identical([rows[0], row_of("mmap", None, status="killed", reason="why")])


def job(model: Path, **fields: Any) -> Job:
    defaults: dict[str, Any] = {
        "prompt": "w00000",
        "n_gen": 4,
        "n_threads": 1,
        "cache": CacheConfig("4s"),
        "mmap": False,
        "repack": False,
    }
    return Job(model=str(model), **(defaults | fields))


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    # Without the compiled runtime, the reason is that it is missing.
    with pytest.raises(DecodeFailedError, match=r"no such file|remoe-edge build") as failure:
        decode_in_process(job(tmp_path / "missing.gguf"))
    assert failure.value.status == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "mmap", "--policy", "lru"], "--policy has no effect without --budget"),
        (["--baseline", "resident", "--memory-limit", "1G"], "--memory-limit has no effect on resident runs"),
        (["--baseline", "mmap", "--expert-cache-verify"], "--expert-cache-verify has no effect without --budget"),
        (["--force"], "--force has no effect without --output"),
        (["--resume"], "--resume has no effect without --output"),
        (["--resume", "--force", "-o", "x"], "give one of them"),
        (["--prompts", "2"], "--prompts has no effect without --workload"),
        (["-p", "text", "--workload", "gsm8k"], "exclude each other"),
        (["-n", "1"], "-n"),
    ],
)
def test_flags_without_effect_are_refused(twin: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["bench", str(twin), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_existing_output_is_refused_before_anything_runs(twin: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    command = [sys.executable, "-m", "remoe_edge", "bench", str(twin), "-o", str(tmp_path / "out.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pass --force" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.fixture(scope="session")
def runtime() -> None:
    ensure_runtime()


def groups_permitted() -> bool:
    try:
        with memory_group(1 << 26):
            return True
    except CgroupUnavailableError:
        return False


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_every_arm_gives_the_same_output_and_a_full_row(twin: Path) -> None:
    order: list[str] = []

    def report(stage: str, _fraction: float | None) -> None:
        if not order or order[-1] != stage:
            order.append(stage)

    wanted = options(
        twin,
        budgets=("2s", "8s", f"{EXPERTS}s"),
        baselines=("mmap", "resident"),
        repetitions=2,
        memory_limit=512 << 20,
        policies=("lru",),
        cache_threads=2,
    )
    result = bench(wanted, report)
    rows = result.rows
    assert [row["status"] for row in rows] == ["ok"] * 5
    check_identical(rows)
    cached = rows[:3]
    for row in rows:
        assert set(row) >= OURS | COMPARED
        assert all(not isinstance(row[key], list | dict) for key in COMPARED)
        assert (row["n_prompt"], row["n_gen"], row["repetitions"]) == (3, 12, 2)
        assert row["tpot_ms_ci95"][0] <= row["tpot_ms"] <= row["tpot_ms_ci95"][1]
        assert row["peak_memory_bytes"] > 1 << 20
        assert row["storage_bytes_per_s"] > 0
        assert row["kernels"] == "plain"
        # A token of this model takes a fraction of a millisecond; below 0.1 % are those of real ones.
        assert 0 < row["timer_overhead"] < 1e-2
        assert row["pause_ms_per_token"] > 0
        assert row["device_state"].keys() == row["device_state_after"].keys()
        check_samples(row, 2)
    assert [row["n_slots"] for row in cached] == [2, 8, EXPERTS]
    assert all(row["policy"] == "lru" and row["cache_threads"] == 2 for row in cached)
    assert cached[0]["hit_rate"] <= cached[1]["hit_rate"] <= cached[2]["hit_rate"]
    assert cached[0]["demand_bytes_per_token"] > cached[2]["demand_bytes_per_token"]
    assert all(row["limit_ratio"] > 0 for row in cached)
    assert rows[3]["limit_ms"] is None
    assert rows[4]["limit_ratio"] == 1
    assert [row["memory_limit_bytes"] for row in rows[3:]] == [512 << 20 if groups_permitted() else None, None]
    names = ("cache 2s lru", "cache 8s lru", f"cache {EXPERTS}s lru", "mmap", "resident")
    arms = [f"twin.gguf, {name}" for name in names]
    assert order == [*arms, *arms[-2::-1]]


def check_samples(row: Row, count: int) -> None:
    """What is kept of each token adds up to what the row says."""
    samples = row["samples"]
    assert len(samples) == count
    steps = count * (row["n_gen"] - 1)
    assert sum(len(sample["itl_ns"]) for sample in samples) == steps
    gaps = [gap for sample in samples for gap in sample["itl_ns"]]
    assert sum(gaps) / steps / MS == pytest.approx(row["itl_ms_mean"])
    assert max(gaps) / MS == pytest.approx(row["itl_ms_max"])
    if row["arm"] != "cache":
        assert all(sample["hits"] is None for sample in samples)
        return
    hits, misses, read, stall = (
        sum(sum(sample[name]) for sample in samples) for name in ("hits", "misses", "bytes", "stall_ns")
    )
    assert hits / (hits + misses) == pytest.approx(row["hit_rate"])
    assert read / steps == pytest.approx(row["bytes_per_token"])
    assert stall / steps / MS == pytest.approx(row["stall_ms_per_token"])
    assert sum(sum(sample["layer_hits"]) for sample in samples) == hits
    assert len(row["layer_hit_rate"]) == LAYERS


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_every_prompt_is_decoded_by_every_arm(twin: Path) -> None:
    workload = Workload("two", (Prompt("a", "w00000"), Prompt("b", "w00000w00001", chat=True)))
    wanted = options(
        twin, workload=workload, budgets=("4s",), baselines=("resident",), repetitions=2, page_cache="warm"
    )
    rows = bench(wanted).rows
    check_identical(rows)
    for row in rows:
        assert [(sample["prompt"], sample["repetition"]) for sample in row["samples"]] == [
            ("a", 0),
            ("b", 0),
            ("a", 1),
            ("b", 1),
        ]
        assert [(output["prompt"], output["n_prompt"]) for output in row["outputs"]] == [("a", 1), ("b", 2)]
        assert all(output["text"].startswith("w0") for output in row["outputs"])
        # A twin has no chat template, so a message is a text.
        assert (row["chat_template"], row["page_cache"], row["repetitions"]) == (False, "warm", 2)
    assert rows[0]["paired_ratios"]["resident"]["pairs"] == 4


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_power_and_mode_of_the_machine_are_in_the_rows(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = orin_nx(tmp_path)
    monkeypatch.setattr(bench_module, "Watch", partial(Watch, root=board))
    # Long enough for some samples, one every 20 ms.
    (row,) = bench(options(twin, budgets=("4s",), n_gen=400)).rows
    assert (row["status"], row["power_mode"], row["power_source"]) == ("ok", "MAXN_SUPER", "ina3221")
    assert row["power_w_mean"] == pytest.approx(VDD_IN_WATTS)
    # Energy counts the pauses of the clock of the token times.
    pauses = row["pause_ms_per_token"] * row["n_gen"] / (row["n_gen"] - 1)
    expected = VDD_IN_WATTS * (row["itl_ms_mean"] + pauses) / 1e3
    assert row["joules_per_token"] == pytest.approx(expected, rel=0.02)
    power = row["samples"][0]["power"]
    assert len(power["tokens_ms"]) == 400
    assert len(power["t_ms"]) == len(power["watts"]) > 5


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_an_interrupted_benchmark_goes_on(twin: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = [sys.executable, "-m", "remoe_edge", "bench", str(twin), "--budget", "4s", "--baseline", "resident"]
    command += ["-p", "w00000", "-n", "40", "-r", "6", "-t", "1", "-o", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if journal.exists() and len(journal.read_text().splitlines()) >= 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert "--resume" in said
    assert not out.exists()
    kept = journal.read_text().splitlines()[1:]
    assert 2 <= len(kept) < 12
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = subprocess.run([*command, "-n", "41", "--resume"], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "number of tokens" in other.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["repetitions"] for row in rows] == [6, 6]
    assert not journal.exists()
    # The first runs are those made before the interruption.
    times = {json.loads(line)["run"]["token_ns"][0] for line in kept}
    assert times <= {sample["ttft_ns"] for row in rows for sample in row["samples"]}


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_an_arm_that_fails_or_is_killed_does_not_stop_the_others(twin: Path) -> None:
    result = bench(options(twin, budgets=("1s", "2s", "auto"), memory_limit=8 << 20, baselines=("resident",)))
    below, killed, auto, resident = result.rows
    assert resident["status"] == "ok"
    if groups_permitted():
        # 8 MiB are too little for Python alone.
        assert [row["status"] for row in (below, killed, auto)] == ["killed"] * 3
        assert "more memory than the limit allows" in killed["reason"]
        assert result.notes == [] or "page cache" in result.notes[0]
    else:
        assert below["status"] == "failed"
        assert "floor" in below["reason"]
        assert "a memory limit is not possible" in " ".join(result.notes)
    assert killed["tpot_ms"] is None or not groups_permitted()


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_where_groups_are_not_permitted_it_measures_without_a_limit_and_says_so(
    twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "memory_group", lambda limit: RefusingContext())
    result = bench(options(twin, budgets=("4s",), memory_limit=1 << 30))
    assert result.rows[0]["status"] == "ok"
    assert result.rows[0]["memory_limit_bytes"] is None
    assert "a memory limit is not possible: no; measured without a limit" in result.notes


class RefusingContext:
    def __enter__(self) -> None:
        raise CgroupUnavailableError("a memory limit is not possible: no")

    def __exit__(self, *exception: object) -> None:
        raise AssertionError("was never entered")


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_the_command_writes_rows_and_a_table(twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "remoe_edge", "bench", str(twin), "--budget", "4s", "-p", "w00000"]
    result = subprocess.run(
        [*command, "-n", "5", "-r", "1", "-t", "1", "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert (row["arm"], row["n_slots"], row["model_path"]) == ("cache", 4, str(twin))
    assert "TPOT = (last - first token) / (n - 1)" in result.stderr
    failed = subprocess.run([*command[:5], "--budget", "1s"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["status"] == "failed"
    assert "Error: no run succeeded" in failed.stderr
    assert "floor" in failed.stderr


@pytest.mark.runtime
@pytest.mark.usefixtures("runtime")
def test_a_run_dies_with_the_process_that_measures_it(twin: Path) -> None:
    code = f"""
from remoe_edge.measure.worker import Job, decode_in_process
from remoe_edge.runtime.llama import CacheConfig
decode_in_process(Job({str(twin)!r}, "w00000", 100_000, 1, CacheConfig("4s"), False, False))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        child = None
        for _ in range(200):
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            # It has said by then that it wants to die with its parent.
            if children and "libllama" in Path(f"/proc/{children[0]}/maps").read_text():
                child = Path("/proc", children[0])
                break
            time.sleep(0.05)
        assert child is not None
        os.kill(parent.pid, signal.SIGKILL)
    for _ in range(100):
        if not child.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{child} goes on")


def test_the_demo_takes_a_free_folder_and_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder() == Path("remoe-demo")
    for name in "remoe-demo", "remoe-demo-2":
        (tmp_path / name).mkdir()
    assert free_folder() == Path("remoe-demo-3")
    (tmp_path / "remoe-demo" / "report.png").write_text("mine")
    refused = CliRunner().invoke(cli, ["demo", "-o", "remoe-demo"])
    assert isinstance(refused.exception, RemoeError)
    assert "pass --force" in str(refused.exception)
    assert CliRunner().invoke(cli, ["demo", "--force"]).exit_code == 2
