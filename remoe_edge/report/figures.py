"""The figures of a report, drawn on matplotlib axes.

Colours come from a `Palette`, so that one drawing serves a light page, a dark page and a picture. A `Figure` says what
it shows; it does not exist where the rows hold nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe_edge.measure.rows import Row
from remoe_edge.report.labels import format_ms, row_label, series_label

_LOG_FROM = 8
"""Ratio of the largest to the least value from which an axis is logarithmic."""
_DOTS = 150
_MIB = 2**20


@dataclass(frozen=True)
class Palette:
    """Colours as matplotlib takes them; `series` are told apart by people who see colours differently, too."""

    text: str
    muted: str
    grid: str
    background: str
    series: tuple[str, ...]
    mmap: str
    resident: str


LIGHT = Palette(
    text="#1b1f24",
    muted="#59636e",
    grid="#dfe3e8",
    background="#ffffff",
    series=("#1f6feb", "#8250df", "#0f8a5f", "#c2255c", "#0c7792", "#946200"),
    mmap="#d9480f",
    resident="#57606a",
)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes
    ----------
    caption
        How to read it, in a sentence or two.
    height
        Of a drawing of usual width, in the unit of the font size times 12.
    draw
        Draws on given axes; the flag says that there is little room.
    """

    name: str
    title: str
    caption: str
    height: Callable[[bool], float]
    draw: Callable[[Any, Palette, bool], None]


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Everything that the rows have data for, in order of importance."""
    return [figure for maker in _MAKERS for figure in maker([row for row in rows if row["tpot_ms"] is not None])]


def _distributions(rows: Sequence[Row]) -> Iterator[Figure]:
    if not rows:
        return
    gaps = [np.concatenate([sample["itl_ns"] for sample in row["samples"]]) / 1e6 for row in rows]

    def draw(axes: Any, palette: Palette, narrow: bool) -> None:
        top = len(rows) - 1
        for index, (row, values) in enumerate(zip(rows, gaps, strict=True)):
            y, color = top - index, _row_color(row, rows, palette)
            dots = np.quantile(values, np.linspace(0, 1, min(len(values), _DOTS)))
            # A fixed pattern: the height of a dot within its band means nothing.
            spread = (np.arange(len(dots)) * 0.618 % 1 - 0.5) * 0.34
            axes.scatter(dots, y + 0.2 + spread * 0.8, s=7 if narrow else 9, color=color, alpha=0.35, linewidths=0)
            low, quarter, median, three, high = np.percentile(values, (5, 25, 50, 75, 95))
            axes.plot([low, high], [y - 0.16] * 2, color=color, linewidth=1.2, solid_capstyle="round")
            axes.plot([quarter, three], [y - 0.16] * 2, color=color, linewidth=5, solid_capstyle="butt")
            axes.plot([median], [y - 0.16], marker="|", markersize=11, markeredgewidth=2, color=palette.text)
            if narrow:
                label = f"{row_label(row, rows)} \u00b7 {format_ms(row['tpot_ms'])} ms"
                axes.annotate(
                    label,
                    (0, y + 0.5),
                    xycoords=("axes fraction", "data"),
                    va="bottom",
                    color=palette.text,
                    fontsize=11,
                )
        style(axes, palette, grid="x")
        _scale(axes, "x", [float(value) for values in gaps for value in (values.min(), values.max())])
        axes.set_ylim(-0.5, top + (0.95 if narrow else 0.6))
        axes.set_yticks(range(len(rows)), [""] * len(rows) if narrow else [row_label(row, rows) for row in rows][::-1])
        axes.tick_params(axis="y", length=0, labelcolor=palette.text, labelsize=12)
        axes.set_xlabel("time between tokens, ms")

    yield Figure(
        "distribution",
        "Time between tokens",
        "Dots are tokens (up to 150 quantiles), below them their median, the middle half (thick) and 5 to 95 % (thin).",
        lambda narrow: (0.72 if narrow else 0.56) * len(rows) * 100 + 60,
        draw,
    )


def _budgets(rows: Sequence[Row]) -> Iterator[Figure]:
    lines = _lines(rows)
    if not lines:
        return
    levels = [row for row in rows if row["arm"] != "cache"]

    def draw(axes: Any, palette: Palette, narrow: bool) -> None:
        values = [row["tpot_ms"] for row in rows] + [row["limit_ms"] for row in rows if row["limit_ms"]]
        for label, own in lines.items():
            color = _row_color(own[0], rows, palette)
            x, y = _mib(own), [row["tpot_ms"] for row in own]
            axes.plot(x, y, color=color, marker="o", markersize=5, linewidth=1.8, label=label, zorder=3)
            for row, value in zip(own, x, strict=True):
                if row["tpot_ms_ci95"]:
                    axes.plot([value] * 2, row["tpot_ms_ci95"], color=color, linewidth=1.3, alpha=0.7, zorder=2)
                    values += row["tpot_ms_ci95"]
            if None not in (limits := [row["limit_ms"] for row in own]):
                axes.plot(
                    x, limits, color=color, linewidth=1.4, linestyle=(0, (1.2, 1.8)), label=_of("limit", label, lines)
                )
        models = list(dict.fromkeys(row["model_path"] for row in rows))
        for row in levels:
            color = palette.mmap if row["arm"] == "mmap" else palette.resident
            axes.axhline(
                row["tpot_ms"],
                color=color,
                linewidth=1.3,
                linestyle="-" if row["model_path"] == models[0] else "--",
                label=f"{row_label(row, rows)}, {format_ms(row['tpot_ms'])} ms",
            )
        style(axes, palette, grid="y")
        _scale(axes, "y", values)
        axes.set_xlabel("expert cache budget, MiB")
        axes.set_ylabel("ms per token")
        legend(axes, palette)

    limited = any(row["limit_ms"] for own in lines.values() for row in own)
    yield Figure(
        "budget",
        "TPOT against budget",
        "Median over repetitions with its 95 % interval."
        + (" The dotted line is the limit: the larger of resident TPOT and bytes over bandwidth." if limited else ""),
        # Each line of the legend takes room from the drawing.
        lambda narrow: (280 if narrow else 300) + 9 * (2 * len(lines) + len(levels)),
        draw,
    )


def _bytes(rows: Sequence[Row]) -> Iterator[Figure]:
    shown = [row for row in rows if row["bytes_per_token"] is not None]
    if not any(row["bytes_per_token"] for row in shown):
        return
    yield _bars(
        "bytes",
        "Read from storage per token",
        "What the cache read; for other arms what the kernel fetched for the process, read-ahead included.",
        "MB per token",
        shown,
        rows,
        [row["bytes_per_token"] / 1e6 for row in shown],
    )


def _energy(rows: Sequence[Row]) -> Iterator[Figure]:
    shown = [row for row in rows if row.get("joules_per_token") is not None]
    if shown:
        yield _bars(
            "energy",
            "Energy per token",
            f"While decoding, idle power included; sensor: {shown[0].get('power_sensor') or 'see the rows'}.",
            "J per token",
            shown,
            rows,
            [row["joules_per_token"] for row in shown],
        )


def _bars(
    name: str, title: str, caption: str, unit: str, shown: Sequence[Row], rows: Sequence[Row], values: list[float]
) -> Figure:
    """Horizontal bars, each with its value: nothing has to be read off an axis."""

    def draw(axes: Any, palette: Palette, narrow: bool) -> None:
        positions = range(len(shown))[::-1]
        colors = [_row_color(row, rows, palette) for row in shown]
        axes.barh(positions, values, height=0.34 if narrow else 0.56, color=colors, linewidth=0)
        # A small bar still has its value right beside it.
        for row, y, value in zip(shown, positions, values, strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(
                text,
                (value, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=palette.text,
                fontsize=12,
            )
            if narrow:
                axes.annotate(
                    row_label(row, rows),
                    (0, y + 0.26),
                    textcoords="data",
                    va="bottom",
                    color=palette.muted,
                    fontsize=11,
                )
        style(axes, palette, grid=None)
        axes.set_xlim(0, max(values) * 1.16)
        axes.set_ylim(-0.6, len(shown) - (0.25 if narrow else 0.4))
        axes.set_yticks(positions, [""] * len(shown) if narrow else [row_label(row, rows) for row in shown])
        axes.tick_params(axis="y", length=0, labelcolor=palette.text, labelsize=12)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel(unit)

    return Figure(name, title, caption, lambda narrow: (46 if narrow else 38) * len(shown) + 40, draw)


def _layers(rows: Sequence[Row]) -> Iterator[Figure]:
    shown = [row for row in rows if row.get("layer_hit_rate")]
    if not shown:
        return

    def draw(axes: Any, palette: Palette, narrow: bool) -> None:
        for index, row in enumerate(shown):
            rates = [np.nan if rate is None else rate * 100 for rate in row["layer_hit_rate"]]
            color = palette.series[index % len(palette.series)]
            axes.plot(
                range(len(rates)),
                rates,
                color=color,
                marker="o",
                markersize=3.5,
                linewidth=1.5,
                label=row_label(row, rows),
            )
        style(axes, palette, grid="y")
        axes.set_ylim(0, 100)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("hits, %")
        legend(axes, palette)

    yield Figure(
        "layers",
        "Hit rate per layer",
        "Experts that were in the cache when a token needed them, after the first token, all runs together.",
        lambda narrow: 320 if narrow else 340,
        draw,
    )


def _power(rows: Sequence[Row]) -> Iterator[Figure]:
    shown = [(row, sample["power"]) for row in rows for sample in row["samples"][:1] if sample.get("power")]
    if not shown:
        return

    def draw(axes: Any, palette: Palette, narrow: bool) -> None:
        peak = max(max(power["watts"]) for _, power in shown)
        for index, (row, power) in enumerate(shown):
            base = (len(shown) - 1 - index) * peak * 1.35
            color = _row_color(row, rows, palette)
            times = np.array(power["t_ms"]) / 1e3
            watts = np.array(power["watts"])
            axes.fill_between(times, base, base + watts, color=color, alpha=0.15, linewidth=0)
            axes.plot(times, base + watts, color=color, linewidth=1.3)
            tokens = np.array(power["tokens_ms"]) / 1e3
            axes.vlines(tokens, base - peak * 0.07, base - peak * 0.01, color=palette.text, linewidth=0.7, alpha=0.6)
            mean = f"{watts.mean():.1f} W mean"
            axes.annotate(
                f"{row_label(row, rows)} \u00b7 {mean}",
                (0, base + peak * 1.06),
                xycoords=("axes fraction", "data"),
                va="bottom",
                color=palette.text,
                fontsize=11,
            )
        style(axes, palette, grid=None)
        axes.set_yticks([])
        axes.set_ylim(-peak * 0.12, (len(shown) - 1) * peak * 1.35 + peak * 1.35)
        axes.set_xlabel("seconds from the start of the prompt")

    yield Figure(
        "power",
        "Power over time",
        "The first run of each arm, all on one scale from 0 W; a mark below the curve is a token.",
        lambda narrow: 90 * len(shown) + 60,
        draw,
    )


_MAKERS = (_distributions, _budgets, _bytes, _layers, _power, _energy)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Cached rows by what they share but for the budget, each by rising budget."""
    lines: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row["arm"] == "cache"), key=lambda row: int(row["budget_bytes"])):
        lines.setdefault(series_label(row, rows), []).append(row)
    return lines


def _of(what: str, label: str, lines: dict[str, list[Row]]) -> str:
    return what if len(lines) == 1 else f"{what}, {label}"


def _mib(rows: Sequence[Row]) -> list[float]:
    return [row["budget_bytes"] / _MIB for row in rows]


def _row_color(row: Row, rows: Sequence[Row], palette: Palette) -> str:
    if row["arm"] == "mmap":
        return palette.mmap
    if row["arm"] == "resident":
        return palette.resident
    lines = list(_lines(rows))
    return palette.series[lines.index(series_label(row, rows)) % len(palette.series)]


def style(axes: Any, palette: Palette, *, grid: str | None) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.muted)
        spine.set_linewidth(0.8)
    axes.tick_params(axis="both", which="both", color=palette.muted, labelcolor=palette.muted, labelsize=11, width=0.8)
    axes.tick_params(axis="y", which="both", length=0)
    for axis in axes.xaxis, axes.yaxis:
        axis.label.set_color(palette.muted)
        axis.label.set_fontsize(11)
    if grid:
        axes.grid(axis=grid, which="major", color=palette.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def _scale(axes: Any, name: str, values: Sequence[float]) -> None:
    """From zero, or logarithmic where values differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    axis = getattr(axes, f"{name}axis")
    limits = getattr(axes, f"set_{name}lim")
    if not positive or max(positive) / min(positive) < _LOG_FROM:
        limits(0, max(positive, default=1) * 1.08)
        return
    getattr(axes, f"set_{name}scale")("log")
    limits(min(positive) / 1.2, max(positive) * 1.2)
    decades = np.log10(max(positive) / min(positive))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Any, palette: Palette) -> None:
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            fontsize=11,
            frameon=False,
            labelcolor=palette.text,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2,
            handlelength=1.6,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
