"""Compares ways to hold a model's experts: decode runs in fresh processes, taking turns, and one row for each way.

TPOT = (time of the last token - time of the first token) / (tokens - 1), per run.

Physical limit: T >= max(T_resident, demand bytes per token / storage bandwidth), all measured in the same benchmark.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from remoe_edge.gguf_io.layout import Layout, read_model
from remoe_edge.measure.cgroup import CgroupUnavailableError, MemoryGroup, memory_group
from remoe_edge.measure.pagecache import drop_page_cache
from remoe_edge.measure.storage import Bandwidth, expert_slices, measure_bandwidth
from remoe_edge.measure.worker import DecodeFailedError, DecodeRun, Job, decode_in_process
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.llama import CacheConfig
from remoe_edge.runtime.wheel import installed_manifest

Row = dict[str, Any]

BASELINES = ("mmap", "resident")

_RESAMPLES = 10_000
_STORAGE_DEPTH = 4
_FINGERPRINT_PAGES = 256
_PAGE = 4096


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes
    ----------
    models
        GGUFs, each measured in every way.
    budgets
        Of the expert cache: bytes ("880MiB"), slots per layer ("16s"), or "auto".
    baselines
        "mmap": stock llama.cpp, experts in the page cache. "resident": all experts in memory, without a memory limit.
        Both use the kernels of the cache, which does not repack expert weights.
    repack
        A second resident row, with the kernels that stock llama.cpp chooses for this CPU.
    memory_limit
        Bytes that runs other than resident ones may take, page cache included.
    policy, io, cache_threads
        As in `CacheConfig`.
    """

    models: Sequence[Path]
    prompt: str
    n_gen: int
    n_threads: int
    budgets: Sequence[str] = ("auto",)
    baselines: Sequence[str] = ()
    repack: bool = False
    repetitions: int = 1
    memory_limit: int | None = None
    policy: str | None = None
    io: str | None = None
    cache_threads: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way to hold the experts of one model. `budget` is None except for "cache"."""

    name: str
    model: Path
    budget: str | None = None
    repack: bool = False

    @property
    def label(self) -> str:
        return f"{self.model.name}, {' '.join(part for part in (self.name, self.budget) if part)}"


@dataclass
class _Record:
    """What the runs of an arm gave so far."""

    runs: list[DecodeRun] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    page_cache: str = ""
    memory_limit: int | None = None
    started: str = ""
    failure: DecodeFailedError | None = None


@dataclass(frozen=True)
class Result:
    """Rows in the order of the arms, and what could not be done as asked, in sentences."""

    rows: list[Row]
    notes: list[str]


def bench(options: Options, report: Report = silent) -> Result:
    """Measure every arm.

    Arms take turns, every other round in reverse, so that what drifts (heat, other load) touches all alike. An arm
    whose run fails is recorded with the reason and not run again. Raises RemoeError if a model's file cannot be read.
    """
    layouts = {model: read_model(model) for model in options.models}
    fingerprints = {model: fingerprint(parts) for model, parts in layouts.items()}
    arms = plan_arms(options)
    records = {arm: _Record() for arm in arms}
    notes: list[str] = []
    bandwidths: dict[Path, list[Bandwidth]] = {model: [] for model in options.models}
    schedule = [arm for round_ in range(options.repetitions) for arm in (arms if round_ % 2 == 0 else arms[::-1])]
    for index, arm in enumerate(schedule):
        if records[arm].failure is None:
            advance = partial(_advance, report, arm.label, index, len(schedule))
            files = [layout.path for layout in layouts[arm.model]]
            _run(arm, options, files, records[arm], notes, advance)
            if arm.name == "cache":
                # The speed of shared storage changes by the minute: it is measured beside every run that depends on it.
                bandwidths[arm.model] += _probe(layouts[arm.model], records[arm].runs)
    for model, probes in bandwidths.items():
        if not probes:
            report(f"{model.name}, storage", 1.0)
            probes += _probe(layouts[model], [])
    rows = [_row(arm, options, records[arm], fingerprints[arm.model], bandwidths[arm.model]) for arm in arms]
    add_limits(rows)
    return Result(rows, notes)


def plan_arms(options: Options) -> list[Arm]:
    """The arms of all models, by model."""
    arms = []
    for model in options.models:
        arms += [Arm("cache", model, budget) for budget in options.budgets]
        arms += [Arm(name, model) for name in options.baselines]
        if options.repack:
            arms.append(Arm("resident", model, repack=True))
    return list(dict.fromkeys(arms))


def _advance(report: Report, label: str, done: int, total: int, fraction: float) -> None:
    report(label, (done + fraction) / total)


def _run(
    arm: Arm,
    options: Options,
    files: list[Path],
    record: _Record,
    notes: list[str],
    progress: Callable[[float], None],
) -> None:
    """One decode run of an arm, added to its record."""
    job = Job(
        model=str(arm.model),
        prompt=options.prompt,
        n_gen=options.n_gen,
        n_threads=options.n_threads,
        cache=CacheConfig(arm.budget, options.policy, options.io, options.cache_threads)
        if arm.budget
        else CacheConfig("off"),
        mmap=arm.name == "mmap",
        repack=arm.repack,
    )

    progress(0)
    record.page_cache = drop_page_cache(files)
    if record.page_cache != "dropped":
        _note(notes, f"the page cache could not be dropped before each run (state: {record.page_cache}); run as root")
    record.started = record.started or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    limit = None if arm.name == "resident" else options.memory_limit
    with _group(limit, notes) as group:
        record.memory_limit = limit if group else None
        try:
            run, peak = decode_in_process(job, group, progress)
        except DecodeFailedError as failure:
            record.failure = failure
        else:
            record.runs.append(run)
            record.peaks.append(peak)


@contextmanager
def _group(limit: int | None, notes: list[str]) -> Iterator[MemoryGroup | None]:
    """A memory group; None without a limit, or where groups are not permitted, which is noted."""
    if limit is None:
        yield None
        return
    manager = memory_group(limit)
    try:
        group = manager.__enter__()
    except CgroupUnavailableError as error:
        _note(notes, f"{error}; measured without a limit")
        yield None
        return
    try:
        yield group
    finally:
        manager.__exit__(None, None, None)


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def _probe(layouts: list[Layout], runs: list[DecodeRun]) -> list[Bandwidth]:
    """Storage bandwidth with as many reads at once as the cache's readers make; empty for a model without experts."""
    slices = expert_slices(layouts)
    infos = [run.info for run in runs if run.info]
    return [measure_bandwidth(slices, infos[0].n_threads if infos else _STORAGE_DEPTH)] if slices else []


def _row(arm: Arm, options: Options, record: _Record, model_fingerprint: str, probes: list[Bandwidth]) -> Row:
    probe = probes[0] if probes else None
    return {
        **_llama_bench_fields(arm, options, record),
        "arm": arm.name,
        "status": record.failure.status if record.failure else "ok",
        "reason": str(record.failure) if record.failure else None,
        "model_path": str(arm.model),
        "model_fingerprint": model_fingerprint,
        "budget": arm.budget,
        "repetitions": len(record.runs),
        "prompt": options.prompt,
        "memory_limit_bytes": record.memory_limit,
        "page_cache": record.page_cache,
        "storage_bytes_per_s": statistics.median(each.bytes_per_s for each in probes) if probes else None,
        "storage_read_bytes": probe.read_bytes if probe else None,
        "storage_depth": probe.depth if probe else None,
        "storage_direct": probe.direct if probe else None,
        **_runtime_fields(),
        **summarize_runs([] if record.failure else record.runs, record.peaks),
    }


def summarize_runs(runs: Sequence[DecodeRun], peaks: Sequence[int]) -> Row:
    """What repetitions of one run gave; all None without any."""
    first = runs[0] if runs else None
    info = first.info if first else None
    # Exact output means that repetitions agree; a hash that does not hold for all of them is none.
    outputs = {run.output_sha256 for run in runs}
    logits = {run.logits_sha256 for run in runs}
    tpots = [tpot_ns(run.token_ns) / 1e6 for run in runs]
    gaps = np.concatenate([np.diff(run.token_ns) for run in runs]) / 1e6 if runs else None
    steps = sum(run.n_gen - 1 for run in runs)
    decodes = [run.decode for run in runs if run.decode]
    looked_up = sum(stats.hits + stats.misses for stats in decodes)
    reads = [run.read_bytes for run in runs]

    def per_token(total: float) -> float | None:
        return total / steps if steps else None

    fetched = per_token(sum(read for read in reads if read is not None)) if None not in reads else None
    return {
        "budget_bytes": info.budget if info else None,
        "budget_used_bytes": info.used if info else None,
        "budget_floor_bytes": info.floor if info else None,
        "n_slots": info.n_slots if info else None,
        "policy": info.policy if info else None,
        "read_mode": info.io if info else None,
        "cache_threads": info.n_threads if info else None,
        "kernels": first.kernels if first else None,
        "ttft_ms": statistics.median(run.token_ns[0] for run in runs) / 1e6 if runs else None,
        "tpot_ms": statistics.median(tpots) if runs else None,
        "tpot_ms_ci95": bootstrap_ci95(tpots),
        **{f"itl_ms_p{p}": float(np.percentile(gaps, p)) if gaps is not None else None for p in (50, 95, 99)},
        "itl_ms_mean": float(gaps.mean()) if gaps is not None else None,
        "hit_rate": sum(stats.hits for stats in decodes) / looked_up if looked_up else None,
        # The cache counts what it reads. Of the others the kernel knows what it fetched from storage for the process.
        "bytes_per_token": per_token(sum(stats.bytes_demand + stats.bytes_prefetch for stats in decodes))
        if decodes
        else fetched,
        "demand_bytes_per_token": per_token(sum(stats.bytes_demand for stats in decodes)) if decodes else None,
        "storage_bytes_per_token": fetched,
        "stall_ms_per_token": per_token(sum(stats.stall_ns for stats in decodes) / 1e6) if decodes else None,
        "major_faults_per_token": per_token(sum(run.major_faults for run in runs)),
        "peak_memory_bytes": max(peaks) if runs else None,
        "memory_bytes": first.memory if first else None,
        "limit_ms": None,
        "limit_ratio": None,
        "joules_per_token": None,
        "output_sha256": outputs.pop() if len(outputs) == 1 else None,
        "logits_sha256": logits.pop() if len(logits) == 1 else None,
    }


def tpot_ns(token_ns: Sequence[int]) -> float:
    """Time per output token from the times of at least two tokens: (last - first) / (n - 1)."""
    return (token_ns[-1] - token_ns[0]) / (len(token_ns) - 1)


def bootstrap_ci95(samples: Sequence[float]) -> list[float] | None:
    """95 % interval of the median, [low, high], by resampling with a fixed seed; None for fewer than two samples."""
    if len(samples) < 2:
        return None
    draws = np.random.default_rng(0).choice(np.asarray(samples), (_RESAMPLES, len(samples)))
    return [float(edge) for edge in np.percentile(np.median(draws, axis=1), (2.5, 97.5))]


def add_limits(rows: list[Row]) -> None:
    """Fill in the physical limit of each row whose model has a resident row with the same kernels.

    A row of the "mmap" arm has none: nothing counts which of the bytes it read were needed.
    """
    resident = {
        row["model_path"]: row["tpot_ms"] for row in rows if row["arm"] == "resident" and row["kernels"] == "plain"
    }
    for row in rows:
        floor = resident.get(row["model_path"])
        if floor is None or row["tpot_ms"] is None or row["arm"] == "mmap":
            continue
        if row["arm"] == "cache":
            if row["storage_bytes_per_s"] is None:
                continue
            floor = max(floor, row["demand_bytes_per_token"] / row["storage_bytes_per_s"] * 1e3)
        elif row["kernels"] != "plain":
            continue
        row["limit_ms"] = floor
        row["limit_ratio"] = row["tpot_ms"] / floor


def fingerprint(layouts: Sequence[Layout]) -> str:
    """A cheap stand-in for a model's hash: SHA-256 over sizes, headers, and 256 pages spread over each file.

    Equal on every machine. Files that differ in a few weights only may have the same one.
    """
    digest = hashlib.sha256()
    for layout in layouts:
        size = layout.path.stat().st_size
        header = min((tensor.start for tensor in layout.tensors.values()), default=size)
        digest.update(size.to_bytes(8, "little"))
        with layout.path.open("rb") as file:
            digest.update(file.read(header))
            for index in range(_FINGERPRINT_PAGES):
                file.seek((size - header) * index // _FINGERPRINT_PAGES + header)
                digest.update(file.read(_PAGE))
    return digest.hexdigest()


@cache
def _runtime_fields() -> Row:
    manifest = installed_manifest()
    return {
        "runtime_key": manifest.key if manifest else None,
        "patch_hash": manifest.patches if manifest else None,
        "llama_cpp_commit": manifest.llama_cpp if manifest else None,
        "device": f"{cpu_name()} ({platform.machine()})",
    }


def cpu_name() -> str:
    """The board's name where the firmware tells it, as on a Jetson, else the processor's."""
    board = Path("/proc/device-tree/model")
    if board.exists():
        return board.read_text().rstrip("\0")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown CPU")


def _llama_bench_fields(arm: Arm, options: Options, record: _Record) -> Row:
    """The fields of llama-bench, so that tools made for it can read our rows: one test of prompt and generation."""
    runs = [] if record.failure else record.runs
    first = runs[0] if runs else None
    job = Job.__dataclass_fields__
    samples = [run.token_ns[-1] for run in runs]
    speeds = [(run.n_prompt + run.n_gen) / run.token_ns[-1] * 1e9 for run in runs]
    return {
        "build_commit": _runtime_fields()["llama_cpp_commit"] or "unknown",
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(arm.model),
        "model_type": first.model_description if first else None,
        "model_size": first.model_bytes if first else None,
        "model_n_params": first.model_params if first else None,
        "n_batch": job["n_batch"].default,
        "n_ubatch": job["n_ubatch"].default,
        "n_threads": options.n_threads,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": 0,
        "n_cpu_moe": 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "mmap" if arm.name == "mmap" else "none",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": arm.repack,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": first.n_prompt if first else None,
        "n_gen": options.n_gen,
        "n_depth": 0,
        "test_time": record.started,
        "avg_ns": round(statistics.mean(samples)) if samples else None,
        "stddev_ns": round(statistics.stdev(samples)) if len(samples) > 1 else 0,
        "avg_ts": statistics.mean(speeds) if speeds else None,
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": samples,
        "samples_ts": speeds,
    }
