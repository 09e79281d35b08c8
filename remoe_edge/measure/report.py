"""A picture of benchmark rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remoe_edge.measure.bench import Row

_LOG_FROM = 8
"""Ratio of the largest to the least value from which an axis is logarithmic."""


def write_report(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw time and bytes per token over the budget as a PNG; stock mmap and resident runs are horizontal lines.

    Rows without measurements are left out. `path` is replaced if it exists; it may be a temporary name.
    """
    # Slow to import, and needed nowhere else.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    time, reads = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model_path"] for row in rows))
    for index, model in enumerate(models):
        color = f"C{index}"
        name = Path(model).stem
        own = [row for row in rows if row["model_path"] == model and row["tpot_ms"] is not None]
        cached = sorted((row for row in own if row["arm"] == "cache"), key=lambda row: int(row["budget_bytes"]))
        x = [row["budget_bytes"] / 2**20 for row in cached]
        if cached:
            y = [row["tpot_ms"] for row in cached]
            time.errorbar(x, y, yerr=_error_bars(cached), color=color, marker="o", capsize=3, label=f"{name}, cache")
            reads.plot(
                x, [row["bytes_per_token"] / 1e6 for row in cached], color=color, marker="o", label=f"{name}, cache"
            )
            limits = [row["limit_ms"] for row in cached]
            if None not in limits:
                time.plot(x, limits, color=color, linestyle=":", label=f"{name}, physical limit")
        for row in own:
            if row["arm"] == "cache":
                continue
            style = "--" if row["arm"] == "mmap" else "-."
            label = f"{name}, {row['arm']}{' (repacked)' if row['kernels'] == 'repack' else ''}"
            time.axhline(row["tpot_ms"], color=color, linestyle=style, alpha=0.7, label=label)
            if row["arm"] == "mmap" and row["bytes_per_token"] is not None:
                reads.axhline(row["bytes_per_token"] / 1e6, color=color, linestyle=style, alpha=0.7, label=label)
    _finish(time, "TPOT, ms = (last - first token) / (n - 1)")
    _finish(reads, "read from storage, MB per token")
    figure.savefig(path, format="png", dpi=130)


def _error_bars(rows: Sequence[Row]) -> list[list[float]] | None:
    intervals = [row["tpot_ms_ci95"] for row in rows]
    if None in intervals:
        return None
    return [
        [max(0.0, row["tpot_ms"] - low) for row, (low, _) in zip(rows, intervals, strict=True)],
        [max(0.0, high - row["tpot_ms"]) for row, (_, high) in zip(rows, intervals, strict=True)],
    ]


def _finish(axes: Any, what: str) -> None:
    axes.set_xlabel("expert cache budget, MiB")
    axes.set_ylabel(what)
    values = [value for line in axes.get_lines() for value in line.get_ydata() if value > 0]
    if values and max(values) / min(values) >= _LOG_FROM:
        axes.set_yscale("log", subs=(2, 5))
        for formatter in axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter:
            formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
