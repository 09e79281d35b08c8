import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_twin import EXPERTS, LAYERS, small_trace, write_small_twin

from remoe_edge.cli import cli
from remoe_edge.commands.demo import free_folder
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure import bench as bench_module
from remoe_edge.measure.bench import (
    Arm,
    Options,
    Row,
    add_limits,
    bench,
    bootstrap_ci95,
    fingerprint,
    plan_arms,
    summarize_runs,
    tpot_ns,
)
from remoe_edge.measure.cgroup import CgroupUnavailableError, memory_group
from remoe_edge.measure.demo import check_identical, merge_rare_experts, write_changed_router
from remoe_edge.measure.report import write_report
from remoe_edge.measure.worker import DecodeFailedError, DecodeRun, Job, decode_in_process
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig, CacheInfo, CacheStats

MS = 1_000_000

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


def stats(hits: int, misses: int, demand: int, stall_ns: int) -> CacheStats:
    return CacheStats(
        calls=1,
        calls_streamed=0,
        hits=hits,
        misses=misses,
        evictions=0,
        bytes_demand=demand,
        bytes_prefetch=0,
        reads=misses,
        stall_ns=stall_ns,
        read_ns=0,
    )


INFO = CacheInfo(
    budget=1000,
    used=900,
    floor=500,
    expert_bytes=5000,
    n_layers=3,
    n_slots=4,
    n_threads=4,
    policy="lfu",
    io="direct",
    kernels="plain",
)
RUN = DecodeRun(
    n_prompt=2,
    n_gen=5,
    token_ns=[100 * MS, 110 * MS, 120 * MS, 130 * MS, 180 * MS],
    prefill=stats(1, 1, 1, 1),
    decode=stats(30, 10, 4000, 8 * MS),
    major_faults=4,
    read_bytes=4096,
    output_sha256="a",
    logits_sha256="b",
    text="",
    info=INFO,
    kernels="plain",
    model_description="tiny",
    model_bytes=1,
    model_params=1,
    memory={},
)


def test_tpot_leaves_out_the_first_token() -> None:
    assert tpot_ns([5, 15, 35]) == 15


def test_a_row_of_one_run() -> None:
    row = summarize_runs([RUN], [7])
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
        "peak_memory_bytes": 7,
        "budget_bytes": 1000,
        "n_slots": 4,
        "policy": "lfu",
        "read_mode": "direct",
        "output_sha256": "a",
    }
    assert {key: row[key] for key in expected} == expected


def test_repetitions_are_summed_and_their_median_is_taken() -> None:
    slower = replace(RUN, token_ns=[time * 2 for time in RUN.token_ns], decode=stats(10, 30, 8000, 0))
    slowest = replace(RUN, token_ns=[time * 4 for time in RUN.token_ns])
    row = summarize_runs([RUN, slowest, slower], [7, 9, 8])
    assert row["tpot_ms"] == 40
    assert row["hit_rate"] == pytest.approx(70 / 120)
    assert row["bytes_per_token"] == pytest.approx(16000 / 12)
    assert row["peak_memory_bytes"] == 9
    assert row["tpot_ms_ci95"] == [20, 80]
    assert summarize_runs([RUN, replace(RUN, output_sha256="c")], [7, 7])["output_sha256"] is None


def test_without_a_cache_bytes_are_those_the_kernel_fetched() -> None:
    stock = replace(RUN, info=None, prefill=None, decode=None)
    row = summarize_runs([stock], [7])
    assert (row["hit_rate"], row["bytes_per_token"], row["demand_bytes_per_token"]) == (None, 1024, None)
    assert summarize_runs([replace(stock, read_bytes=None)], [7])["bytes_per_token"] is None


def test_the_interval_of_known_data() -> None:
    rng = np.random.default_rng(3)
    samples = rng.normal(100, 5, 400).tolist()
    low, high = bootstrap_ci95(samples) or (0, 0)
    # The standard error of the median of normal data is 1.2533 sigma / sqrt(n).
    assert low < np.median(samples) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 5 / 20, rel=0.35)
    assert bootstrap_ci95(samples) == [low, high]
    assert bootstrap_ci95([1.0]) is None


def row_of(arm: str, tpot_ms: float | None, **fields: Any) -> Row:
    row = {
        "model_path": "m.gguf",
        "arm": arm,
        "budget": None,
        "tpot_ms": tpot_ms,
        "tpot_ms_ci95": None,
        "kernels": "plain",
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
        row_of("cache", 60.0, demand_bytes_per_token=10e6),
        row_of("cache", 60.0, demand_bytes_per_token=40e6),
        row_of("mmap", 900.0),
        row_of("resident", 20.0),
        row_of("resident", 15.0, kernels="repack"),
        row_of("cache", None),
    ]
    assert limits(rows) == [(20, 3), (40, 1.5), (None, None), (20, 1), (None, None), (None, None)]


def test_without_a_resident_run_there_is_no_limit() -> None:
    other = row_of("resident", 20.0, model_path="other.gguf")
    assert limits([row_of("cache", 60.0, demand_bytes_per_token=1e6), other])[0] == (None, None)


def options(*models: Path, **fields: Any) -> Options:
    defaults: dict[str, Any] = {"prompt": "w00000w00001w00002", "n_gen": 12, "n_threads": 1}
    return Options(models=models, **(defaults | fields))


def test_arms_of_all_models() -> None:
    a, b = Path("a"), Path("b")
    wanted = options(a, b, budgets=("8s", "8s"), baselines=("mmap", "resident"), repack=True)
    arms = [("cache", "8s", False), ("mmap", None, False), ("resident", None, False), ("resident", None, True)]
    assert plan_arms(wanted) == [Arm(name, model, budget, repack) for model in (a, b) for name, budget, repack in arms]


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


def test_a_report_is_a_picture(tmp_path: Path) -> None:
    rows = [
        row_of("cache", 60.0, budget_bytes=1 << 20, tpot_ms_ci95=[50.0, 70.0], limit_ms=20.0),
        row_of("cache", 50.0, budget_bytes=2 << 20, tpot_ms_ci95=[45.0, 51.0], limit_ms=20.0),
        row_of("mmap", 900.0),
        row_of("resident", 20.0, bytes_per_token=0.0),
        row_of("cache", None, model_path="failed.gguf"),
    ]
    path = tmp_path / "report.png"
    write_report(rows, path, title="test")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    write_report(rows[2:], path, title="no cache")


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
        (["--force"], "--force has no effect without --output"),
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
        policy="lru",
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
        assert row["joules_per_token"] is None
    assert [row["n_slots"] for row in cached] == [2, 8, EXPERTS]
    assert all(row["policy"] == "lru" and row["cache_threads"] == 2 for row in cached)
    assert cached[0]["hit_rate"] <= cached[1]["hit_rate"] <= cached[2]["hit_rate"]
    assert cached[0]["demand_bytes_per_token"] > cached[2]["demand_bytes_per_token"]
    assert all(row["limit_ratio"] > 0 for row in cached)
    assert rows[3]["limit_ms"] is None
    assert rows[4]["limit_ratio"] == 1
    assert [row["memory_limit_bytes"] for row in rows[3:]] == [512 << 20 if groups_permitted() else None, None]
    arms = [f"twin.gguf, {name}" for name in ("cache 2s", "cache 8s", f"cache {EXPERTS}s", "mmap", "resident")]
    assert order == [*arms, *arms[-2::-1]]


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
