"""What a benchmark found, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_edge.measure.rows import Row
from remoe_edge.measure.stats import Ratio
from remoe_edge.report.labels import DASH, arm_name, budget_name, format_mib, format_ms, row_label

FEW_REPETITIONS = 5
"""Below it, an interval over repetitions says little."""


def headline(rows: Sequence[Row]) -> str:
    """The main result: the fastest cached arm against stock mmap and against all experts in memory."""
    measured = [row for row in rows if row["status"] == "ok"]
    cached = [row for row in measured if row["arm"] == "cache"]
    if not measured:
        return "No arm could be measured."
    best = min(cached or measured, key=lambda row: row["tpot_ms"])
    model = Path(best["model_path"]).stem
    how = f"with {budget_name(best)} of expert cache" if best["arm"] == "cache" else f"as {arm_name(best)}"
    parts = []
    ratios = best["paired_ratios"]
    if best["arm"] == "cache" and "mmap" in ratios:
        limit = best["memory_limit_bytes"]
        within = f" in the same {format_mib(limit)} of memory" if limit else ""
        parts.append(f"{_times(_ratio(ratios['mmap']))} stock mmap{within}")
    if best["arm"] == "cache" and "resident" in ratios:
        parts.append(f"{_times(_ratio(ratios['resident']))} having all experts in memory")
    if best["limit_ratio"] is not None and best["arm"] == "cache":
        parts.append(f"{best['limit_ratio']:.2f} times what compute and storage allow")
    text = f"{model} {how}: {format_ms(best['tpot_ms'])} ms per token"
    return f"{text}, {_join(parts)}." if parts else f"{text}."


def remarks(rows: Sequence[Row]) -> list[str]:
    """What else a reader must know: the second model, exactness, failures, and how far the figures carry."""
    sentences = _second_model(rows) + _exactness(rows)
    for row in rows:
        if row["status"] != "ok":
            sentences.append(f"{row_label(row, rows)} {row['status']}: {row['reason']}.".replace("..", "."))
    few = {row["repetitions"] for row in rows if row["tpot_ms"] is not None and row["repetitions"] < FEW_REPETITIONS}
    if few:
        sentences.append(
            f"With {' or '.join(map(str, sorted(few)))} repetition{'s' if few != {1} else ''}, "
            f"{'intervals say little' if few != {1} else 'there is no interval'}: take at least {FEW_REPETITIONS}."
        )
    return sentences


def _second_model(rows: Sequence[Row]) -> list[str]:
    sentences = []
    for model in dict.fromkeys(row["model_path"] for row in rows):
        own = [row for row in rows if row["model_path"] == model and "base" in row["paired_ratios"]]
        cached = [row for row in own if row["arm"] == "cache" and row["status"] == "ok"]
        if cached:
            parts = [f"{_times(_ratio(row['paired_ratios']['base']))} the first model at {budget_name(row)}" for row in cached]
            sentences.append(f"{Path(model).stem} is {_join(parts)}.")
    return sentences


def _exactness(rows: Sequence[Row]) -> list[str]:
    """Whether the arms of each model put out the same tokens, where at least two can be compared."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["tpot_ms"] is not None:
            groups.setdefault((row["model_path"], row["prompts_sha256"]), []).append(row)
    compared = {key: group for key, group in groups.items() if len(group) > 1}
    if not compared:
        return []
    differing = [
        Path(model).stem for (model, _), group in compared.items() if len({row["output_sha256"] for row in group}) > 1
    ]
    if differing:
        # Other kernels round differently, which is no fault of the cache.
        return [f"Arms of {_join(differing)} did not all put out the same tokens: see the table."]
    return ["All arms of a model put out the same tokens." if len(compared) > 1 else "All arms put out the same tokens."]


def _ratio(content: Row) -> Ratio:
    edges = content["ci95"]
    return Ratio(content["ratio"], (edges[0], edges[1]) if edges else None, content["pairs"])


def _times(ratio: Ratio) -> str:
    """ "2.0 times faster than (95 % interval 1.9-2.2)", or that there is no clear difference."""
    faster = ratio.ratio < 1
    edges = ratio.ci95
    if edges and edges[0] <= 1 <= edges[1]:
        return f"not clearly faster or slower ({edges[0]:.2f}{DASH}{edges[1]:.2f} times the time) than"
    value = 1 / ratio.ratio if faster else ratio.ratio
    text = f"{_number(value)} times {'faster' if faster else 'slower'}"
    if edges:
        low, high = (1 / edges[1], 1 / edges[0]) if faster else edges
        text += f" (95 % interval {_number(low)}{DASH}{_number(high)})"
    return f"{text} than"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
