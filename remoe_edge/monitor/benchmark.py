"""A benchmark, seen through its journal while it runs and through its rows afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remoe_edge.measure.arms import Arm
from remoe_edge.measure.journal import Record, journal_path, read_journal
from remoe_edge.measure.rows import read_rows, summarize
from remoe_edge.monitor.frame import ArmState, Frame
from remoe_edge.report.labels import row_label


def is_benchmark(target: str) -> bool:
    """Whether there is a result of `bench` of this name, complete or not."""
    return Path(target).is_file() or journal_path(Path(target)).is_file()


def benchmark_frame(output: Path) -> Frame:
    """The state of the benchmark that writes `output`; `output` may also be the journal itself."""
    running = output if output.suffix == ".partial" else journal_path(output)
    if running.is_file():
        return _running(running)
    rows = read_rows(output)
    arms = tuple(_arm_state(row_label(row, rows), row["status"], len(row["samples"]), row) for row in rows)
    latest = next((row for row in reversed(rows) if row["arm"] == "cache"), rows[-1])
    return _frame(str(output), "complete; figures of the last row with a cache", latest, arms)


def _running(path: Path) -> Frame:
    plan, records = read_journal(path)
    states = []
    for index, entry in enumerate(plan["list of models or arms"]):
        own = [record for record in records if record.turn.arm == index]
        failed = next((record for record in own if record.run is None), None)
        fields = summarize([] if failed else own)
        status = failed.status if failed else "ok" if own else "waiting"
        label = Arm(**{**entry, "model": Path(entry["model"])}).label
        states.append(_arm_state(label, status, len(own), fields))
    repetitions = plan.get("number of repetitions (-r)")
    made = f"{len(records)} run{'' if len(records) == 1 else 's'} made"
    state = f"running, {made}" + (f"; {repetitions} repetitions of each prompt" if repetitions else "")
    done = [record for record in records if record.run]
    if not done:
        return Frame(str(path), state, arms=tuple(states))
    return _frame(str(path), state, _row(done), tuple(states))


def _row(records: Sequence[Record]) -> dict[str, Any]:
    """Fields of a row, of the last run alone."""
    last = records[-1]
    degrees = [value for value in (last.state or {}).get("temperature_c", []) if value is not None]
    return {
        **summarize([last]),
        "storage_bytes_per_s": last.storage.bytes_per_s if last.storage else None,
        "temperature_c_max": max(degrees, default=None),
    }


def _arm_state(label: str, status: str, runs: int, row: dict[str, Any]) -> ArmState:
    return ArmState(label, status, runs, row["tpot_ms"], row["hit_rate"], row["bytes_per_token"])


def _frame(source: str, state: str, row: dict[str, Any], arms: tuple[ArmState, ...]) -> Frame:
    tpot, read = row["tpot_ms"], row["bytes_per_token"]
    demand = row["demand_bytes_per_token"]
    stall = row["stall_ms_per_token"]
    return Frame(
        source=source,
        state=state,
        tpot_ms=tpot,
        ttft_ms=row["ttft_ms"],
        tokens_per_s=row["tokens_per_s"],
        hit_rate=row["hit_rate"],
        layer_hit_rate=tuple(row["layer_hit_rate"] or ()),
        read_bytes_per_s=read / tpot * 1e3 if tpot and read is not None else None,
        prefetch_bytes_per_s=(read - demand) / tpot * 1e3 if tpot and demand is not None else None,
        stall_share=stall / tpot if tpot and stall is not None else None,
        storage_bytes_per_s=row["storage_bytes_per_s"],
        budget_bytes=row["budget_bytes"],
        used_bytes=row["budget_used_bytes"],
        memory_bytes=row["peak_memory_bytes"],
        power_w=row["power_w_mean"],
        temperature_c=row["temperature_c_max"],
        arms=arms,
    )
