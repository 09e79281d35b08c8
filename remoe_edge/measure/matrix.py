"""The benchmark matrix: twins of several models, each at several budgets, in every way to hold the experts.

One run is one call of `bench` for one engine: all engines of a twin take turns, every other round in reverse, so that
what drifts touches all alike. Runs are kept in a journal as they end, and a matrix that was interrupted goes on there.

Every budget has a memory limit of its own, budget + dense weights + HEADROOM_BYTES, and stock mmap runs under the same
limits: its rows have the `slots` of the budget whose limit they ran under.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import append_line
from remoe_edge.gguf_io.layout import Layout, read_model
from remoe_edge.measure.arms import Options
from remoe_edge.measure.bench import bench
from remoe_edge.measure.rows import Row
from remoe_edge.measure.stats import bootstrap_ci95
from remoe_edge.measure.workloads import single_prompt
from remoe_edge.progress import Report, silent
from remoe_edge.routing.trace import excerpt, load_trace, packaged_trace
from remoe_edge.routing.twin import plan_twin, write_twin
from remoe_edge.runtime.wheel import installed_manifest
from remoe_edge.sizes import format_size

FRACTIONS = (Fraction(1, 8), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2), Fraction(1))
"""C/E: slots per layer, as a part of a layer's experts."""

HEADROOM_BYTES = 192 << 20
"""What a run may take beside its budget and the dense weights: interpreter, libraries, KV cache, compute buffers (about
40 MiB of anonymous memory in runs of the twins), page cache."""

_PROMPT = "w00000"
# Of these a row has the sum or the largest over rounds; of all other numbers that differ, the median.
_SUMMED = {"repetitions"}
_LARGEST = {"peak_memory_bytes"}
_SHARED = {"output_sha256", "logits_sha256"}


@dataclass(frozen=True)
class TwinSpec:
    """A twin to measure. ``trace`` is a file name in the folder of traces; None is the packaged trace of OLMoE.

    ``tokens`` of the trace from the start of ``sequence`` on are replayed, in its first ``layers`` MoE layers.
    """

    name: str
    trace: str | None
    arch: str
    hidden: int
    ff: int
    quant: str
    layers: int
    sequence: int = 0
    tokens: int = 128


TWINS = (
    TwinSpec("olmoe-1b-7b", None, "olmoe", 2048, 1024, "Q4_0", 16),
    # 18 of 26 layers and 14 of 24: files of 6 GB. Steps from the last sequence: policies are tuned on earlier ones.
    TwinSpec("deepseek-v2-lite", "deepseek-v2-lite.npz", "deepseek2", 2048, 1408, "Q4_0", 18, sequence=-1),
    TwinSpec("gpt-oss-20b", "gpt-oss-20b.npz", "gpt-oss", 2880, 2880, "MXFP4", 14, sequence=-1),
)


@dataclass(frozen=True)
class Settings:
    """What is measured on every twin. ``n_gen_mmap`` is the length of stock mmap's runs, which take seconds a token."""

    n_threads: int
    fractions: Sequence[Fraction] = FRACTIONS
    policies: Sequence[str] = ("next-use", "lfu", "lru")
    read_modes: Sequence[str] = ("direct", "mmap")
    prefetches: Sequence[str] = ("off", "router")
    n_gen: int = 64
    n_gen_mmap: int = 16
    repetitions: int = 3


@dataclass(frozen=True)
class Engine:
    """One way to hold the experts of a twin. ``slots`` per layer set the budget, and for "mmap" the memory limit."""

    arm: str
    slots: int | None = None
    policy: str | None = None
    read_mode: str | None = None
    repack: bool = False
    prefetch: str | None = None

    @property
    def label(self) -> str:
        slots = None if self.slots is None else f"{self.slots}s"
        prefetch = None if self.prefetch in (None, "off") else f"prefetch {self.prefetch}"
        parts = (self.arm, slots, self.policy, self.read_mode, prefetch, "repacked" if self.repack else None)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Sizes:
    """What one model takes, in bytes. ``slot_bytes`` is one expert in every layer."""

    layers: int
    experts: int
    top_k: int
    slot_bytes: int
    dense_bytes: int
    file_bytes: int

    def limit(self, slots: int) -> int:
        return slots * self.slot_bytes + self.dense_bytes + HEADROOM_BYTES


def engines(sizes: Sizes, settings: Settings) -> list[Engine]:
    """All engines for one twin, budgets without room for a token's experts included: they are refused, on record."""
    slots = sorted({max(1, int(fraction * sizes.experts)) for fraction in settings.fractions})
    result = [Engine("resident"), Engine("resident", repack=True)]
    for n in slots:
        result.append(Engine("mmap", n))
        # Where nothing is evicted all policies are one, and nothing is left to read ahead.
        fits = n >= sizes.experts
        policies = settings.policies[:1] if fits else settings.policies
        prefetches = ("off",) if fits else settings.prefetches
        ways = product(policies, settings.read_modes, prefetches)
        result += [Engine("cache", n, policy, mode, prefetch=prefetch) for policy, mode, prefetch in ways]
    return result


def prepare_twin(spec: TwinSpec, traces: Path | None, folder: Path, report: Report = silent) -> Path:
    """The twin's file in ``folder``, written unless it is there. Raises RemoeError if its trace is missing."""
    if spec.trace is None:
        trace = packaged_trace()
    elif traces is None:
        raise RemoeError(f"the twin of {spec.name} needs a trace; name the folder that has {spec.trace} with --traces")
    else:
        trace = load_trace(traces / spec.trace)
    trace = excerpt(trace, sequence=spec.sequence, tokens=min(spec.tokens, trace.tokens))
    key = hashlib.sha256(json.dumps([asdict(spec), trace.digest(), __version__]).encode()).hexdigest()[:12]
    path = folder / f"{spec.name}-{key}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        twin = plan_twin(
            trace,
            arch=spec.arch,
            hidden=spec.hidden,
            ff=spec.ff,
            quant=spec.quant,
            layers=min(spec.layers, trace.layers),
        )
        stage = f"writing {path.name} ({format_size(twin.nbytes)})"
        write_twin(twin, path, progress=lambda written: report(stage, written / twin.nbytes))
    return path


def model_sizes(model: Path) -> Sizes:
    """Raises RemoeError if the model has no experts."""
    layouts = read_model(model)
    tensors = [tensor for layout in layouts for tensor in layout.tensors.values()]
    experts = [tensor for tensor in tensors if tensor.experts]
    if not experts:
        raise RemoeError(f"{model}: has no experts; the matrix is for Mixture-of-Experts models")
    return Sizes(
        layers=len({tensor.name.split(".")[1] for tensor in experts}),
        experts=experts[0].experts,
        top_k=_top_k(layouts[0]),
        slot_bytes=sum(tensor.slice_bytes for tensor in experts),
        dense_bytes=sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in experts),
        file_bytes=sum(layout.source.size for layout in layouts),
    )


def _top_k(layout: Layout) -> int:
    return layout.integer(f"{layout.text('general.architecture')}.expert_used_count") or 1


def measure_twin(name: str, model: Path, settings: Settings, journal: Path, report: Report = silent) -> list[Row]:
    """One row for each engine of one twin; runs that ``journal`` has already are not made again.

    An engine that fails, is killed or refused has a row that says why, and is not tried in later rounds. Raises
    RemoeError if the journal is of another model, runtime or settings.
    """
    sizes = model_sizes(model)
    plan = engines(sizes, settings)
    rounds = range(settings.repetitions)
    schedule = [(round_, engine) for round_ in rounds for engine in (plan if round_ % 2 == 0 else plan[::-1])]
    kept = _open_journal(journal, _settings_object(model, settings))
    known = {(row["round"], row["engine"]) for row in kept}
    failed = {row["engine"] for row in kept if row["status"] != "ok"}
    for index, (round_, engine) in enumerate(schedule):
        if (round_, engine.label) in known or engine.label in failed:
            continue
        stage = f"{name}, {engine.label}{_time_left(schedule[index:], kept, failed)}"
        begin = time.monotonic()
        row = _run(model, engine, settings, sizes, partial(_advance, report, stage, index, len(schedule)))
        row |= {"round": round_, "engine": engine.label, "twin": name, "seconds": time.monotonic() - begin}
        kept.append(row)
        if row["status"] != "ok":
            failed.add(engine.label)
        _append(journal, row)
    rows = [merge_rounds([row for row in kept if row["engine"] == engine.label]) for engine in plan]
    add_limits(rows)
    return rows


def _advance(report: Report, stage: str, done: int, total: int, _stage: str, part: float | None) -> None:
    report(stage, (done + (part or 0)) / total)


def _settings_object(model: Path, settings: Settings) -> dict[str, Any]:
    manifest = installed_manifest()
    fractions = [str(fraction) for fraction in settings.fractions]
    settings_object = json.loads(json.dumps({**asdict(settings), "fractions": fractions}))
    return {"model": model.name, "runtime": manifest.key if manifest else None, **settings_object}


def _open_journal(path: Path, settings: dict[str, Any]) -> list[Row]:
    """Rows of runs that ended; the first line has the settings. A last line that was cut off is removed."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        path.unlink(missing_ok=True)
        _append(path, settings)
        return []
    if (other := json.loads(lines[0])) != settings:
        differing = [key for key in settings if other.get(key) != settings[key]]
        raise RemoeError(
            f"{path}: holds runs with another {', '.join(differing)}; choose another folder for results, or start anew "
            "with --force"
        )
    if whole != data:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in lines[1:]]


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        append_line(file, row)


def _time_left(schedule: Sequence[tuple[int, Engine]], kept: Sequence[Row], failed: set[str]) -> str:
    """Runs take as long as those of their engine before, unknown ones as long as the mean."""
    if not kept:
        return ""
    seconds: dict[str, list[float]] = {}
    for row in kept:
        seconds.setdefault(row["engine"], []).append(row["seconds"])
    mean = statistics.mean(row["seconds"] for row in kept)
    known = {(row["round"], row["engine"]) for row in kept}
    left = sum(
        statistics.mean(seconds.get(engine.label, [mean]))
        for round_, engine in schedule
        if (round_, engine.label) not in known and engine.label not in failed
    )
    return f", about {max(1, round(left / 60))} min left"


def _run(model: Path, engine: Engine, settings: Settings, sizes: Sizes, report: Report) -> Row:
    """One run of one engine: the row of `bench`, with the engine's place in the matrix."""
    limit = None if engine.slots is None else sizes.limit(engine.slots)
    place = {
        "slots": engine.slots,
        "cache_fraction": None if engine.slots is None else engine.slots / sizes.experts,
        "repack": engine.repack,
        **{key: getattr(sizes, key) for key in ("layers", "experts", "top_k")},
    }
    # Beside a mapped file nothing has to stay in memory; all others would be killed, or others for them.
    need = {"mmap": 0, "resident": sizes.file_bytes + HEADROOM_BYTES}.get(engine.arm, limit or 0)
    if need > (available := _available_memory()):
        reason = f"needs {format_size(need)} of memory, {format_size(available)} are available"
        return {"arm": engine.arm, "status": "refused", "reason": reason, "model_path": str(model), **place}
    row = bench(_options(model, engine, settings, limit), report).rows[0]
    # Asked for less than the floor: that the runtime says no, and with which number, is the result.
    refused = engine.arm == "cache" and (engine.slots or 0) < sizes.top_k and row["status"] == "failed"
    return {**row, **place, **({"status": "refused"} if refused else {})}


def _options(model: Path, engine: Engine, settings: Settings, limit: int | None) -> Options:
    """The engine as the only arm of a benchmark."""
    options = Options(
        models=(model,),
        workload=single_prompt(_PROMPT),
        n_gen=settings.n_gen_mmap if engine.arm == "mmap" else settings.n_gen,
        n_threads=settings.n_threads,
        budgets=(),
        memory_limit=limit,
    )
    if engine.arm == "cache":
        return replace(
            options,
            budgets=(f"{engine.slots}s",),
            policies=(engine.policy,),
            read_modes=(engine.read_mode,),
            prefetches=(engine.prefetch,),
        )
    return replace(options, baselines=(engine.arm,), repack=engine.repack)


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def merge_rounds(rows: Sequence[Row]) -> Row:
    """One row for the runs of one engine: medians, the 95 % interval of the median TPOT, and every TPOT."""
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        return bad[0]
    merged: Row = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if key in _SUMMED:
            merged[key] = sum(values)
        elif key in _LARGEST:
            merged[key] = max(values)
        elif key in _SHARED:
            # Exact output means that rounds agree; a hash that does not hold for all of them is none.
            merged[key] = values[0] if len(set(values)) == 1 else None
        elif all(isinstance(value, float) for value in values):
            merged[key] = statistics.median(values)
        elif all(isinstance(value, list) for value in values) and key.startswith("samples"):
            merged[key] = [item for value in values for item in value]
        else:
            merged[key] = values[0]
    tpots = [row["tpot_ms"] for row in rows]
    merged |= {"tpot_ms_rounds": tpots, "tpot_ms_ci95": bootstrap_ci95(tpots)}
    for key in "round", "seconds":
        merged.pop(key, None)
    return merged


def add_limits(rows: Sequence[Row]) -> None:
    """Fill in max(T_resident, needed bytes / bandwidth) of one twin's rows, all from the same matrix.

    Needed are the bytes that were demanded and, of those that were read ahead, the ones that were used.

    The bandwidth is the median over all of the twin's rows: that of shared storage changes by the minute. Rows of stock
    mmap have no limit, because nothing counts which of the bytes that it read were needed; they can be held against the
    rows of the cache at the same memory limit.
    """
    resident = next((row["tpot_ms"] for row in rows if _is_plain_resident(row)), None)
    rates = [rate for row in rows if (rate := row.get("storage_bytes_per_s"))]
    for row in rows:
        row["limit_ms"] = row["limit_ratio"] = None
        if resident is None or row["status"] != "ok":
            continue
        if row["arm"] == "cache" and rates:
            read_ms = row["needed_bytes_per_token"] / statistics.median(rates) * 1e3
            row["limit_ms"] = max(resident, read_ms)
        elif _is_plain_resident(row):
            row["limit_ms"] = resident
        if row["limit_ms"]:
            row["limit_ratio"] = row["tpot_ms"] / row["limit_ms"]


def _is_plain_resident(row: Mapping[str, Any]) -> bool:
    return row["arm"] == "resident" and not row["repack"] and row["status"] == "ok"
