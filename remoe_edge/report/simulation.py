"""The picture of a simulation: hit rate and misses by slots, expected times where known, and hits per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from remoe_edge.measure.rows import Row
from remoe_edge.report.draw import PNG_DPI, canvas
from remoe_edge.report.figures import LIGHT, legend, style

_WIDTH, _HEIGHT, _STRIP, _TOP = 1140, 320, 26, 150
_DASHES = ("-", "--", ":", "-.")


def write_png(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the rows of `remoe-edge simulate`. `path` is replaced if it exists; it may be a temporary name.

    Traces differ in the dashes of their lines, policies in colour. The strip at the bottom shows the first trace under
    the first policy: a row for each number of slots, a column for each layer.
    """
    timed = any(row["limit_ms"] is not None for row in rows)
    shown = [row for row in rows if (row["trace"], row["policy"]) == (rows[0]["trace"], rows[0]["policy"])]
    shown.sort(key=lambda row: -int(row["slots"]))
    heights = [_HEIGHT, _STRIP * len(shown) + 90]
    with canvas(_WIDTH, sum(heights) + _TOP) as drawing:
        drawing.patch.set_facecolor(LIGHT.background)
        drawing.suptitle(title, fontsize=13, color=LIGHT.text, x=0.01, ha="left")
        grid = drawing.add_gridspec(2, 3 if timed else 2, height_ratios=heights)
        panels = [drawing.add_subplot(grid[0, column]) for column in range(3 if timed else 2)]
        _lines(panels[0], rows, lambda row: row["hit_rate"] * 100, "hits, %", "Hit rate")
        panels[0].set_ylim(0, 100)
        if rows[0]["bytes_per_token"] is None:
            _lines(panels[1], rows, lambda row: row["misses_per_token"], "misses per token", "Misses")
        else:
            _lines(panels[1], rows, lambda row: row["bytes_per_token"] / 1e6, "MB per token", "Bytes to read")
        panels[1].set_ylim(bottom=0)
        if timed:
            _times(panels[2], rows)
        legend(panels[0], LIGHT)
        _strip(drawing, drawing.add_subplot(grid[1, :]), shown)
        drawing.savefig(path, format="png", dpi=PNG_DPI)


def _series(rows: Sequence[Row]) -> list[tuple[str, str, str, list[Row]]]:
    """Label, colour, dashes and rows by rising slots, of each trace and policy."""
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    learned = [policy for policy in policies if policy != "belady"]
    found = []
    for trace in traces:
        for policy in policies:
            own = [row for row in rows if (row["trace"], row["policy"]) == (trace, policy)]
            own.sort(key=lambda row: int(row["slots"]))
            # The bound that no cache can reach is no colour among others.
            color = LIGHT.muted if policy == "belady" else LIGHT.series[learned.index(policy) % len(LIGHT.series)]
            label = f"{policy}, {Path(trace).stem}" if len(traces) > 1 else policy
            found.append((label, color, _DASHES[traces.index(trace) % len(_DASHES)], own))
    return found


def _lines(axes: Any, rows: Sequence[Row], value: Any, unit: str, title: str) -> None:
    for label, color, dashes, own in _series(rows):
        points = [row["slots"] for row in own], [value(row) for row in own]
        axes.plot(*points, color=color, linestyle=dashes, marker="o", markersize=5, linewidth=1.8, label=label)
    _frame(axes, rows, unit, title)


def _times(axes: Any, rows: Sequence[Row]) -> None:
    """For each series the range between full overlap of reads and compute, and none."""
    for _, color, dashes, own in _series(rows):
        slots = [row["slots"] for row in own]
        low, high = ([row[name] for row in own] for name in ("limit_ms", "no_overlap_ms"))
        axes.fill_between(slots, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(slots, low, color=color, linestyle=dashes, marker="o", markersize=4, linewidth=1.6)
    _frame(axes, rows, "ms per token", "TPOT: from full overlap (line) to none")
    axes.set_ylim(bottom=0)


def _frame(axes: Any, rows: Sequence[Row], unit: str, title: str) -> None:
    style(axes, LIGHT, grid="y")
    ticks = sorted({row["slots"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("slots per layer")
    axes.set_ylabel(unit)
    above = -(-len(_series(rows)) // 2)
    axes.set_title(title, fontsize=13, color=LIGHT.text, loc="left", pad=10 + 17 * above, weight="bold")


def _strip(drawing: Any, axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    rates = np.array([[np.nan if rate is None else rate * 100 for rate in row["layer_hit_rate"]] for row in rows])
    colors = LinearSegmentedColormap.from_list("hits", [LIGHT.background, LIGHT.series[0]])
    image = axes.imshow(rates, aspect="auto", cmap=colors, vmin=0, vmax=100, interpolation="nearest")
    style(axes, LIGHT, grid=None)
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(range(len(rows)), [str(row["slots"]) for row in rows])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("slots")
    axes.set_title(f"Hits per layer, %, {rows[0]['policy']}", fontsize=13, color=LIGHT.text, loc="left", weight="bold")
    if rates.shape[1] <= 32:
        for y, line in enumerate(rates):
            for x, rate in enumerate(line):
                if not np.isnan(rate):
                    color = LIGHT.background if rate > 60 else LIGHT.text
                    axes.text(x, y, f"{rate:.0f}", ha="center", va="center", fontsize=9, color=color)
    else:
        bar = drawing.colorbar(image, ax=axes, pad=0.01, fraction=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=LIGHT.muted, labelcolor=LIGHT.muted, labelsize=11)
