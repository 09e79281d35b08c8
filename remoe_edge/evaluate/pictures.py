"""Pictures of an evaluation: what was gained and what it cost, ablations, and the frontier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remoe_edge.evaluate.evaluation import CONTROL, TUNED
from remoe_edge.evaluate.frontier import COST
from remoe_edge.evaluate.report import select
from remoe_edge.report.figures import LIGHT

_BASE, _TUNED = LIGHT.resident, LIGHT.series[0]


def draw_evaluation(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Reuse by layer, miss change by size of the cache, and what it cost by text. `path` becomes a PNG."""
    totals = {row["router"]: row for row in select(result, text="all", phase="reading")}
    own = {row["router"]: row for row in select(result, text="all", phase="writing")}
    tuned = result["groups"][TUNED]["routers"]
    with _canvas(path, title, 3) as (layers, misses, cost):
        for name in tuned:
            for side, color in ("base", _BASE), ("tuned", _TUNED):
                rates = totals[name][f"layers_{side}"]["reuse_rate"]
                label = side if name == tuned[0] else None
                layers.plot(range(len(rates)), [100 * rate for rate in rates], "o-", color=color, ms=3, label=label)
        layers.axhline(100 * result["chance_reuse_rate"], color=LIGHT.muted, ls=":", lw=1, label="chance, K/E")
        layers.set(xlabel="MoE layer", ylabel="reuse rate, %", ylim=(0, None))
        layers.xaxis.get_major_locator().set_params(integer=True)
        _titled(layers, "Experts that the next token reuses")
        lines = [
            ("held-out text", _TUNED, "-", [totals[name] for name in tuned]),
            ("own output", LIGHT.series[2], "-", [own[name] for name in tuned if name in own]),
            ("CE only", _BASE, "--", [totals[name] for name in result["groups"].get(CONTROL, {}).get("routers", ())]),
        ]
        sizes = list(result["slots"])
        for label, color, style, rows in lines:
            for index, row in enumerate(rows):
                values = [100 * row["lru_miss_change"][size] for size in sizes]
                misses.plot(sizes, values, f"o{style}", color=color, ms=3, label=None if index else label)
        misses.axhline(0, color=LIGHT.grid, lw=0.8)
        misses.set(xlabel="slots per layer / experts", ylabel="change, %")
        _titled(misses, "Misses of a cold LRU cache")
        texts = list(result["texts"])
        for index, name in enumerate(tuned):
            rows = [select(result, router=name, text=text, multiple=1, phase="reading")[0] for text in texts]
            values = [100 * row["ppl_change"] for row in rows]
            ends = [
                [abs(v - 100 * row["ppl_delta_ci95"][i]) for v, row in zip(values, rows, strict=True)] for i in (0, 1)
            ]
            places = [place + 0.15 * (index - (len(tuned) - 1) / 2) for place in range(len(texts))]
            cost.errorbar(values, places, xerr=ends, fmt="o", color=_TUNED, ms=3, lw=0.8)
        cost.axvline(0, color=LIGHT.grid, lw=0.8)
        cost.set_yticks(range(len(texts)), texts)
        cost.set(xlabel="change of perplexity, %, and its 95 % interval")
        _titled(cost, "What it costs")


def draw_ablation(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Every setting by what it costs and what it gains, with its spread over seeds. `path` becomes a PNG."""
    with _canvas(path, title, 2) as axes:
        for place, (key, name) in zip(
            axes,
            (("reuse_rate_change", "Reuse rate against perplexity"), ("lru_miss_change 1/4", "Misses at C/E = 1/4")),
            strict=True,
        ):
            for group, found in result["groups"].items():
                color = {TUNED: _TUNED, CONTROL: LIGHT.mmap}.get(group, _BASE)
                x, y = found["ppl_change"], found[key]
                place.scatter([100 * v for v in x["seeds"]], [100 * v for v in y["seeds"]], s=8, color=color, alpha=0.5)
                place.plot(100 * x["mean"], 100 * y["mean"], "o", color=color, ms=6)
                place.annotate(
                    "full loss" if group == TUNED else group,
                    (100 * x["mean"], 100 * y["mean"]),
                    xytext=(6, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=color,
                )
            place.axhline(0, color=LIGHT.grid, lw=0.8)
            place.axvline(0, color=LIGHT.grid, lw=0.8)
            place.margins(0.15)
            place.set(xlabel="change of perplexity, %", ylabel="change, %")
            _titled(place, name, legend=False)


def draw_frontier(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Perplexity against bytes per token, a panel for each budget. `path` becomes a PNG."""
    slots = sorted({point["slots"] for point in points})
    with _canvas(path, title, len(slots)) as axes:
        for place, size in zip(axes, slots, strict=True):
            experts = points[0]["experts"]
            for side, color, offset in ("base", _BASE, (-4, -10)), ("tuned", _TUNED, (4, 4)):
                own = [point for point in points if point["slots"] == size and point["side"] == side]
                own.sort(key=lambda point: point["route_bias"])
                x = [point["bytes_per_token"] / 1e6 for point in own]
                y = [point["ppl"] for point in own]
                place.plot(x, y, "-o", color=color, lw=1.3, ms=4, label=f"{side} + bias")
                place.plot(x[:1], y[:1], "D", color=color, ms=7, label=side)
                for point, mb, ppl in zip(own[1:], x[1:], y[1:], strict=True):
                    place.annotate(
                        f"{point['route_bias']:g}",
                        (mb, ppl),
                        xytext=offset,
                        textcoords="offset points",
                        ha="right" if side == "base" else "left",
                        fontsize=7,
                        color=color,
                    )
                if side == "base":
                    limit = y[0] * (1 + COST)
                    place.axhline(limit, color=LIGHT.muted, ls=":", lw=1, label=f"base + {COST:.0%}")
            place.margins(y=0.12)
            place.set(xlabel="read from storage, MB per token", ylabel="perplexity", xlim=(0, None))
            _titled(place, f"{size} of {experts} experts of a layer in memory")


@contextmanager
def _canvas(path: Path, title: str, panels: int) -> Iterator[Sequence[Any]]:
    # Slow to import, and needed nowhere else.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * panels + 0.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, fontsize=11, color=LIGHT.text, x=0.01, ha="left")
    figure.savefig(path, dpi=144, format="png")


def _titled(axes: Any, title: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=LIGHT.text)
    for side in "top", "right":
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(color=LIGHT.grid, lw=0.5)
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
