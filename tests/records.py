"""Records of decode runs with known numbers, and rows made from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from remoe_edge.measure.arms import Arm, Options, Turn
from remoe_edge.measure.journal import Record
from remoe_edge.measure.rows import Row, add_limits, add_ratios, make_row
from remoe_edge.measure.storage import Bandwidth
from remoe_edge.measure.worker import DecodeRun, LayerCounters, TokenCounters
from remoe_edge.measure.workloads import Prompt, Workload
from remoe_edge.runtime.llama import CacheInfo, CacheStats

MS = 1_000_000


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
    start_ns=1_000 * MS,
    pause_ns=[1 * MS] * 5,
    timer_ns=200.0,
    tokens=TokenCounters([8, 8, 7, 7], [2, 2, 3, 3], [1000] * 4, [2 * MS] * 4, [1] * 4, [1024] * 4),
    layers=LayerCounters([20, 10, 0], [0, 10, 0]),
)
STOCK = replace(RUN, info=None, prefill=None, decode=None, layers=None)


def record(run: DecodeRun | None, *, arm: int = 0, prompt: int = 0, repetition: int = 0, **fields: Any) -> Record:
    defaults: dict[str, Any] = {
        "status": "ok" if run else "failed",
        "reason": None if run else "why",
        "peak": 7,
        "page_cache": "dropped",
        "memory_limit": None,
        "cgroup": None,
        "started": "2026-01-02T03:04:05Z",
        "seconds": 1.0,
    }
    return Record(turn=Turn(arm, prompt, repetition), run=run, **(defaults | fields))


def paced(tpot_ms: float, run: DecodeRun = RUN, **fields: Any) -> DecodeRun:
    """A run with this TPOT: its gaps are all equal."""
    return replace(run, token_ns=[round((50 + index * tpot_ms) * MS) for index in range(run.n_gen)], **fields)


def options(**fields: Any) -> Options:
    workload = Workload("words", (Prompt("first", "w00000"), Prompt("second", "w00001")))
    defaults: dict[str, Any] = {"models": [Path("m.gguf")], "workload": workload, "n_gen": 5, "n_threads": 1}
    return Options(**(defaults | fields))


def make_rows(tpots: dict[Arm, list[float]], **fields: Any) -> list[Row]:
    """Rows of arms with these TPOTs of their repetitions, two prompts each; a budget is its number of bytes."""
    rows = []
    for arm, values in tpots.items():
        cached = arm.budget is not None
        info = replace(INFO, budget=int(arm.budget or 0), policy=arm.policy or "lfu", io=arm.read_mode or "direct")
        base = replace(RUN, info=info) if cached else STOCK
        records = [
            record(paced(value, base), prompt=prompt, repetition=repetition, **fields)
            for repetition, value in enumerate(values)
            for prompt in range(2)
        ]
        probes = [Bandwidth(1e6, 4096, 4, True)]
        rows.append(make_row(arm, options(), records, "f", probes))
    add_limits(rows)
    add_ratios(rows)
    return rows
