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
    """The main result in one sentence: the fastest cached arm, and how it compares with stock mmap."""
    best = _best(rows)
    if best is None:
        return "No arm could be measured."
    model = Path(best["model_path"]).stem
    if best["arm"] != "cache":
        return f"{model}, {arm_name(best)}: {format_ms(best['tpot_ms'])} ms per token."
    lossy = f" and a route bias of {best['route_bias']:g} (lossy)" if _is_lossy(best) else ""
    text = f"{model} with {budget_name(best)} of expert cache{lossy}: {format_ms(best['tpot_ms'])} ms per token"
    mmap = best["paired_ratios"].get("mmap")
    return f"{text}, {_times(_ratio(mmap))} stock mmap." if mmap else f"{text}."


def lead(rows: Sequence[Row]) -> str:
    """What belongs to the headline: its interval, and the distance to what is possible; empty if there is nothing."""
    best = _best(rows)
    if best is None or best["arm"] != "cache":
        return ""
    ratios, parts = best["paired_ratios"], []
    if "mmap" in ratios:
        limit = best["memory_limit_bytes"]
        within = f"Both in {format_mib(limit)} of memory" if limit else "Both without a memory limit"
        interval = _interval(_ratio(ratios["mmap"]))
        parts.append(f"{within}; {interval}." if interval else f"{within}.")
    comparisons = []
    if "resident" in ratios:
        ratio = _ratio(ratios["resident"])
        interval = _interval(ratio)
        comparisons.append(f"{_times(ratio)} having all experts in memory" + (f" ({interval})" if interval else ""))
    if best["limit_ratio"] is not None:
        comparisons.append(f"{best['limit_ratio']:.2f} times what compute and storage bandwidth allow")
    if comparisons:
        text = _join(comparisons)
        parts.append(f"{text[0].upper()}{text[1:]}.")
    return " ".join(parts)


def _best(rows: Sequence[Row]) -> Row | None:
    measured = [row for row in rows if row["status"] == "ok"]
    cached = [row for row in measured if row["arm"] == "cache"]
    exact = [row for row in cached if not _is_lossy(row)]
    return min(exact or cached or measured, key=lambda row: float(row["tpot_ms"]), default=None)


def _is_lossy(row: Row) -> bool:
    """Whether other experts were chosen than the model's; older rows do not say."""
    return row.get("route_bias") is not None


def remarks(rows: Sequence[Row]) -> list[str]:
    """What else a reader must know: the second model, exactness, failures, and how far the figures carry."""
    exact, lossy = ([row for row in rows if _is_lossy(row) == is_lossy] for is_lossy in (False, True))
    sentences = _second_model(rows) + _exactness(exact)
    if lossy:
        names = _join(list(dict.fromkeys(row_label(row, rows) for row in lossy)))
        sentences.append(f"Lossy, with other experts than the model's and another output: {names}.")
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
            parts = [
                f"{_times(_ratio(row['paired_ratios']['base']))} the first model at {budget_name(row)}"
                for row in cached
            ]
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
    return [
        "All arms of a model put out the same tokens." if len(compared) > 1 else "All arms put out the same tokens."
    ]


def _ratio(content: Row) -> Ratio:
    edges = content["ci95"]
    return Ratio(content["ratio"], (edges[0], edges[1]) if edges else None, content["pairs"])


def _times(ratio: Ratio) -> str:
    """ "2.0 times faster than", or that there is no clear difference."""
    if ratio.ci95 and ratio.ci95[0] <= 1 <= ratio.ci95[1]:
        return "not clearly faster or slower than"
    faster = ratio.ratio < 1
    return f"{_number(1 / ratio.ratio if faster else ratio.ratio)} times {'faster' if faster else 'slower'} than"


def _interval(ratio: Ratio) -> str:
    """The interval of the number in `_times`."""
    if not ratio.ci95:
        return ""
    low, high = ratio.ci95
    if low > 1 or high >= 1:
        return f"95 % interval {_number(low)}{DASH}{_number(high)}"
    return f"95 % interval {_number(1 / high)}{DASH}{_number(1 / low)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
