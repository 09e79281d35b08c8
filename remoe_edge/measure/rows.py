"""Result rows: one for each arm, a superset of llama-bench's fields.

TPOT = (time of the last token - time of the first token) / (tokens - 1), per run; of a repetition, the mean over its
prompts; of a row, the median over repetitions.

Physical limit: T >= max(T_resident, demand bytes per token / storage bandwidth), all measured in the same benchmark.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remoe_edge.errors import RemoeError
from remoe_edge.measure.arms import Arm, Options
from remoe_edge.measure.journal import Record
from remoe_edge.measure.llama_bench import llama_bench_fields, runtime_fields
from remoe_edge.measure.stats import Ratio, bootstrap_ci95, paired_ratio
from remoe_edge.measure.storage import Bandwidth
from remoe_edge.measure.worker import DecodeRun
from remoe_edge.measure.workloads import Workload
from remoe_edge.runtime.llama import DEFAULT_ROUTE_KEEP

Row = dict[str, Any]

# Files of an earlier version lack these.
_NEEDED = ("arm", "status", "tpot_ms", "samples", "outputs", "paired_ratios", "prompts_sha256")

TPOT_FORMULA = "TPOT = (last - first token) / (n - 1)"


def make_row(
    arm: Arm, options: Options, records: Sequence[Record], fingerprint: str, probes: Sequence[Bandwidth]
) -> Row:
    """The row of an arm from its runs, and from all measurements of its model's storage."""
    failed = [record for record in records if record.run is None]
    bad = failed or [record for record in records if record.status != "ok"]
    measured = [] if failed else records
    probe = probes[0] if probes else None
    workload = options.workload
    last = records[-1] if records else None
    return {
        **llama_bench_fields(arm, options, measured, records[0].started if records else ""),
        "arm": arm.name,
        "status": bad[0].status if bad else "ok",
        "reason": bad[0].reason if bad else None,
        "model_path": str(arm.model),
        "model_fingerprint": fingerprint,
        "budget": arm.budget,
        # Not null: lossy, other experts were chosen than the model's.
        "route_bias": arm.route_bias,
        "route_keep": None
        if arm.route_bias is None
        else DEFAULT_ROUTE_KEEP
        if arm.route_keep is None
        else arm.route_keep,
        "repetitions": len({record.turn.repetition for record in measured}),
        "workload": workload.name,
        "prompts": [prompt.name for prompt in workload.prompts],
        "prompts_sha256": workload.sha256,
        "prompt": workload.prompts[0].text if len(workload.prompts) == 1 else None,
        "memory_limit_bytes": last.memory_limit if last else None,
        "cgroup": last.cgroup if last else None,
        "page_cache": last.page_cache if last else None,
        "storage_bytes_per_s": statistics.median(each.bytes_per_s for each in probes) if probes else None,
        "storage_read_bytes": probe.read_bytes if probe else None,
        "storage_depth": probe.depth if probe else None,
        "storage_direct": probe.direct if probe else None,
        **runtime_fields(),
        **summarize(measured),
        **_device_state(measured),
        "outputs": _outputs(measured, workload),
        "samples": [_sample(record, workload) for record in measured],
    }


def summarize(records: Sequence[Record]) -> Row:
    """What the runs of an arm gave, without failed ones; all None without any."""
    runs = [record.run for record in records if record.run]
    first = runs[0] if runs else None
    info = first.info if first else None
    tpots = _repetition_tpots(records)
    gaps = np.concatenate([np.diff(run.token_ns) for run in runs]) / 1e6 if runs else None
    steps = sum(run.n_gen - 1 for run in runs)
    decodes = [run.decode for run in runs if run.decode]
    looked_up = sum(stats.hits + stats.misses for stats in decodes)
    reads = [run.read_bytes for run in runs]
    tpot = statistics.median(tpots) if runs else None

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
        "prefetch": info.prefetch if info else None,
        "cache_threads": info.n_threads if info else None,
        "kernels": first.kernels if first else None,
        "gpu_memory_bytes": first.gpu.bytes if first and first.gpu else None,
        "chat_template": any(run.chat_template for run in runs) if runs else None,
        "verify": info.verify if info else None,
        "reads_wrong": _reads_wrong(runs) if info and info.verify else None,
        "warm": (info.warm or None) if info else None,
        "loaded_bytes": info.bytes_loaded if info else None,
        "load_ms": statistics.median(run.load_ns for run in runs) / 1e6 if runs else None,
        "ttft_ms": statistics.median(run.token_ns[0] for run in runs) / 1e6 if runs else None,
        "tpot_ms": tpot,
        "tpot_ms_mean": statistics.mean(tpots) if runs else None,
        "tpot_ms_ci95": bootstrap_ci95(tpots),
        "tokens_per_s": 1e3 / tpot if tpot else None,
        **{f"itl_ms_p{p}": float(np.percentile(gaps, p)) if gaps is not None else None for p in (50, 95, 99)},
        "itl_ms_max": float(gaps.max()) if gaps is not None else None,
        "itl_ms_mean": float(gaps.mean()) if gaps is not None else None,
        # Within the token times: reading the clock. Beside them, while the clock stands still: counters and hashes.
        "timer_overhead": statistics.mean(run.timer_ns for run in runs) / (tpot * 1e6) if tpot else None,
        "pause_ms_per_token": sum(sum(run.pause_ns) for run in runs) / 1e6 / sum(run.n_gen for run in runs)
        if runs
        else None,
        "hit_rate": sum(stats.hits for stats in decodes) / looked_up if looked_up else None,
        "layer_hit_rate": _layer_hit_rate(runs),
        **_forecasts(runs),
        # The cache counts what it reads. Of the others the kernel knows what it fetched from storage for the process.
        "bytes_per_token": per_token(sum(stats.bytes_demand + stats.bytes_prefetch for stats in decodes))
        if decodes
        else fetched,
        "demand_bytes_per_token": per_token(sum(stats.bytes_demand for stats in decodes)) if decodes else None,
        # What no engine with these hits could have left unread: bytes read ahead count where they were needed.
        "needed_bytes_per_token": per_token(sum(stats.bytes_demand + stats.bytes_prefetch_used for stats in decodes))
        if decodes
        else None,
        "storage_bytes_per_token": fetched,
        "stall_ms_per_token": per_token(sum(stats.stall_ns for stats in decodes) / 1e6) if decodes else None,
        "major_faults_per_token": per_token(sum(run.major_faults for run in runs)),
        "peak_memory_bytes": max(record.peak for record in records) if runs else None,
        "memory_bytes": first.memory if first else None,
        "limit_ms": None,
        "limit_ratio": None,
        "paired_ratios": {},
        **_energy(records),
        "output_sha256": _common_hash(records, "output_sha256"),
        "logits_sha256": _common_hash(records, "logits_sha256"),
    }


def tpot_ns(token_ns: Sequence[int]) -> float:
    """Time per output token from the times of at least two tokens: (last - first) / (n - 1)."""
    return (token_ns[-1] - token_ns[0]) / (len(token_ns) - 1)


def _repetition_tpots(records: Sequence[Record]) -> list[float]:
    """TPOT in milliseconds of each repetition: the mean over its prompts."""
    repetitions: dict[int, list[float]] = {}
    for record in records:
        if record.run:
            repetitions.setdefault(record.turn.repetition, []).append(tpot_ns(record.run.token_ns) / 1e6)
    return [statistics.mean(tpots) for tpots in repetitions.values()]


def _reads_wrong(runs: Sequence[DecodeRun]) -> int:
    """Reads whose bytes were not those of their checksum; each was made once more."""
    return sum(stats.reads_wrong for run in runs for stats in (run.prefill, run.decode) if stats)


def _layer_hit_rate(runs: Sequence[DecodeRun]) -> list[float | None] | None:
    layers = [run.layers for run in runs if run.layers]
    if not layers:
        return None
    hits = np.sum([each.hits for each in layers], axis=0)
    looked_up = hits + np.sum([each.misses for each in layers], axis=0)
    return [float(hit / total) if total else None for hit, total in zip(hits, looked_up, strict=True)]


def _forecasts(runs: Sequence[DecodeRun]) -> Row:
    """How good the forecasts of what a layer needs were; None where none were made. See `CacheStats`."""
    decodes = [run.decode for run in runs if run.decode]

    def total(name: str) -> int:
        return sum(getattr(stats, name) for stats in decodes)

    def share(part: str, whole: str) -> float | None:
        return total(part) / total(whole) if total(whole) else None

    layers = [run.layers for run in runs if run.layers and run.layers.forecast_experts]
    named = np.sum([each.forecast_experts or [] for each in layers], axis=0) if layers else np.zeros(0)
    used = np.sum([each.forecast_used or [] for each in layers], axis=0) if layers else np.zeros(0)
    cost = share("forecast_ns", "forecasts")
    return {
        "forecast_precision": share("forecast_used", "forecast_experts"),
        "forecast_recall": share("forecast_used", "forecast_needed"),
        "layer_forecast_precision": [float(u / n) if n else None for u, n in zip(used, named, strict=True)]
        if total("forecasts")
        else None,
        "forecasts_read_share": share("forecasts_read", "forecasts"),
        "forecast_us": None if cost is None else cost / 1e3,
    }


def _common_hash(records: Sequence[Record], name: str) -> str | None:
    """The hash of what was put out; of several prompts, that of their hashes.

    Exact output means that repetitions agree; a hash that does not hold for all of them is none.
    """
    prompts: dict[int, set[str]] = {}
    for record in records:
        if record.run:
            prompts.setdefault(record.turn.prompt, set()).add(getattr(record.run, name))
    if not prompts or any(len(hashes) > 1 for hashes in prompts.values()):
        return None
    hashes = [prompts[index].copy().pop() for index in sorted(prompts)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


_ENERGY_MEANS = (
    "power_w_mean",
    "power_w_idle",
    "energy_prefill_j",
    "energy_decode_j",
    "joules_per_token",
    "joules_per_token_above_idle",
)


def _energy(records: Sequence[Record]) -> Row:
    """Energy over the runs: means of what was measured; None where nothing was."""
    runs = [record.energy for record in records if record.energy]
    known = [run for run in runs if run["joules_per_token"] is not None]

    def values(name: str) -> list[float]:
        return [run[name] for run in runs if run[name] is not None]

    statuses = {run["power_status"] for run in runs}
    status = "not measured" if not known else "measured" if statuses == {"measured"} else "partial"
    first = runs[0] if runs else None
    return {
        "power_source": first["power_source"] if first else None,
        "power_sensor": first["power_sensor"] if first else None,
        "power_hz": first["power_hz"] if first else None,
        "power_status": status,
        "power_reason": next((run["power_reason"] for run in runs if run["power_reason"]), None),
        "power_samples": sum(run["power_samples"] for run in runs),
        "power_gap_ms_max": max(values("power_gap_ms_max"), default=None),
        "power_w_max": max(values("power_w_max"), default=None),
        **{name: statistics.mean(values(name)) if values(name) else None for name in _ENERGY_MEANS},
        "joules_per_token_ci95": bootstrap_ci95(values("joules_per_token"), mean=True),
    }


def _device_state(records: Sequence[Record]) -> Row:
    """Power mode, clocks and so on: as the first run began, with what the others add."""
    states = [record.state for record in records if record.state]
    first = states[0]["before"] if states else {}
    degrees = [value for state in states for value in state["temperature_c"] if value is not None]
    return {
        "power_mode": first.get("power_mode"),
        "power_mode_id": first.get("power_mode_id"),
        "jetson_clocks": first.get("jetson_clocks"),
        "temperature_c_max": max(degrees, default=None),
        "throttled": next((state["throttled"] for state in states if state["throttled"]), None),
        "cooled_down_s": sum(state["cooled_down_s"] for state in states),
        "device_state": first or None,
        "device_state_after": states[-1]["after"] if states else None,
    }


def _outputs(records: Sequence[Record], workload: Workload) -> list[Row]:
    """What was put out after each prompt, of the first repetition."""
    return [
        {
            "prompt": workload.prompts[record.turn.prompt].name,
            "n_prompt": record.run.n_prompt,
            "text": record.run.text,
            "sha256": record.run.output_sha256,
        }
        for record in records
        if record.run and record.turn.repetition == 0
    ]


def _sample(record: Record, workload: Workload) -> Row:
    """One run, with what happened at each token."""
    run = record.run
    assert run is not None
    return {
        "prompt": workload.prompts[record.turn.prompt].name,
        "repetition": record.turn.repetition,
        "started": record.started,
        "ttft_ns": run.token_ns[0],
        "itl_ns": np.diff(run.token_ns).tolist(),
        **{
            name: getattr(run.tokens, name) if run.tokens else None
            for name in ("hits", "misses", "bytes", "stall_ns", "major_faults", "read_bytes")
        },
        "layer_hits": run.layers.hits if run.layers else None,
        "layer_misses": run.layers.misses if run.layers else None,
        "peak_memory_bytes": record.peak,
        "storage_bytes_per_s": record.storage.bytes_per_s if record.storage else None,
        # Without any sample, the row says why.
        "energy": record.energy if record.energy and record.energy["power_samples"] else None,
        "power": record.power,
        "temperature_c": record.state["temperature_c"] if record.state else None,
        "status": record.status,
    }


def add_limits(rows: Sequence[Row]) -> None:
    """Fill in the physical limit of each row whose model has a resident row with the same kernels.

    A row of the "mmap" arm has none: nothing counts which of the bytes it read were needed.
    """
    resident = {(row["model_path"], row["repack"]): row["tpot_ms"] for row in rows if row["arm"] == "resident"}
    for row in rows:
        floor = resident.get((row["model_path"], row["repack"]))
        if floor is None or row["tpot_ms"] is None or row["arm"] == "mmap":
            continue
        if row["arm"] == "cache":
            if row["storage_bytes_per_s"] is None:
                continue
            floor = max(floor, row["needed_bytes_per_token"] / row["storage_bytes_per_s"] * 1e3)
        row["limit_ms"] = floor
        row["limit_ratio"] = row["tpot_ms"] / floor


def add_ratios(rows: Sequence[Row]) -> None:
    """Fill in how each row's TPOT compares with that of other arms, run by run: above 1 it takes longer.

    The others are stock mmap, resident with the same kernels as the cache, and for a second model the same arm of the
    first ("base").
    """
    for row in rows:
        for name, other in _references(row, rows).items():
            ratio = run_ratio(row, other)
            if ratio is not None:
                row["paired_ratios"][name] = {"ratio": ratio.ratio, "ci95": ratio.ci95, "pairs": ratio.pairs}


def run_ratio(row: Row, other: Row) -> Ratio | None:
    """TPOT of one row over that of another, over runs of the same prompt and repetition."""
    return paired_ratio(run_tpots(row), run_tpots(other))


def run_tpots(row: Row) -> dict[tuple[str, int], float]:
    """TPOT in milliseconds of every run of a row, by prompt and repetition."""
    return {
        (sample["prompt"], sample["repetition"]): statistics.mean(sample["itl_ns"]) / 1e6 for sample in row["samples"]
    }


def _references(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    found = {}
    base = next((each["model_path"] for each in rows if each["status"] == "ok"), None)
    for other in rows:
        if other is row:
            continue
        same_model = other["model_path"] == row["model_path"]
        if same_model and (other["arm"] == "mmap" or (other["arm"] == "resident" and other["repack"] == row["repack"])):
            found[other["arm"]] = other
        elif not same_model and other["model_path"] == base and arm_key(other) == arm_key(row):
            found["base"] = other
    return found


def arm_key(row: Row) -> tuple[Any, ...]:
    """What makes rows of different models or benchmarks comparable: the same way to hold the experts."""
    return tuple(
        row.get(name)
        for name in ("arm", "budget", "policy", "read_mode", "prefetch", "route_bias", "route_keep", "repack")
    )


def read_rows(path: Path) -> list[Row]:
    """Rows from a JSONL file or a JSON array, as `bench` writes them. Raises RemoeError if it is neither."""
    try:
        content = path.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            rows = json.loads(content)
        else:
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    except (ValueError, OSError) as error:
        raise RemoeError(f"{path}: cannot be read as JSONL: {error}") from error
    if not rows:
        raise RemoeError(f"{path}: holds no rows")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise RemoeError(
                f"{path}, row {number}: has no field {missing[0]!r}; give a file that `remoe-edge bench` wrote"
            )
    return list(rows)
