"""What a benchmark matrix found, as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_edge.measure.rows import Row
from remoe_edge.sizes import format_size

_COLUMNS = (
    "engine",
    "C/E",
    "budget",
    "memory limit",
    "TPOT ms [95 %]",
    "limit ms",
    "x limit",
    "hits",
    "MB per token",
    "stall ms",
    "peak memory",
    "output",
)

# A ratio to the limit that no noise of a quiet machine explains.
_IMPOSSIBLE = 0.9


def markdown_table(rows: Sequence[Row]) -> str:
    """One table for each twin; engines without a measurement have their reason below it."""
    parts = []
    for twin in dict.fromkeys(row["twin"] for row in rows):
        own = [row for row in rows if row["twin"] == twin]
        parts.append(f"## {twin}\n\n{_description(own)}\n")
        lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        lines += [_line(_cells(row, _reference(own, row))) for row in own]
        parts.append("\n".join(lines) + "\n")
        if any((row["limit_ratio"] or 1) < _IMPOSSIBLE for row in own):
            parts.append("A run cannot beat the limit: the machine was not quiet, measure again.\n")
        reasons = [f"- {row['engine']} {row['status']}: {row['reason']}" for row in own if row["status"] != "ok"]
        if reasons:
            parts.append("\n".join(reasons) + "\n")
    return "\n".join(parts)


def _description(rows: Sequence[Row]) -> str:
    row = next((row for row in rows if row["status"] == "ok"), rows[0])
    rates = [row["storage_bytes_per_s"] for row in rows if row.get("storage_bytes_per_s")]
    text = f"{row['layers']} MoE layers of {row['experts']} experts, top {row['top_k']}"
    if row["status"] != "ok":
        return f"{text}."
    speed = f"; storage {min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f} GB/s at the size of a slice" if rates else ""
    return (
        f"{text}; {format_size(row['model_size'])}, {row['n_threads']} threads, rounds: {row['repetitions']}, "
        f"page cache {row['page_cache']} before each run{speed}. TPOT = (last - first token) / (n - 1)."
    )


def _reference(rows: Sequence[Row], row: Row) -> str | None:
    """What the resident run with the same kernels and length put out."""
    for other in rows:
        if other["arm"] == "resident" and other["status"] == "ok" and not other["repack"]:
            return str(other["logits_sha256"]) if other["n_gen"] == row.get("n_gen") else None
    return None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, reference: str | None) -> list[str]:
    fraction = "-" if row["cache_fraction"] is None else f"{row['slots']}/{row['experts']}"
    name = " ".join(part for part in (row["arm"], row.get("policy"), row.get("read_mode"), _prefetch(row)) if part)
    if row["arm"] == "cache" and row["status"] != "ok":
        name = row["engine"]
    if row["repack"]:
        name += ", repacked kernels"
    if row["status"] != "ok":
        return [name, fraction, "-", "-", row["status"], *["-"] * (len(_COLUMNS) - 5)]
    interval = row["tpot_ms_ci95"]
    output = "-"
    if reference is not None and not row["repack"]:
        output = "= resident" if row["logits_sha256"] == reference else "DIFFERS"
    return [
        name,
        fraction,
        _size(row["budget_bytes"]),
        _size(row["memory_limit_bytes"]),
        f"{row['tpot_ms']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""),
        _number(row["limit_ms"], ".1f"),
        _number(row["limit_ratio"], ".2f"),
        _number(row["hit_rate"], ".1%"),
        _number(row["bytes_per_token"], ".1f", 1e-6),
        _number(row["stall_ms_per_token"], ".1f"),
        _size(row["peak_memory_bytes"]),
        output,
    ]


def _prefetch(row: Row) -> str | None:
    return None if row.get("prefetch") in (None, "off") else f"prefetch {row['prefetch']}"


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """TPOT over C/E, a panel for each twin, as a PNG: engines, resident run, and the limit of each policy's misses.

    Engines without a measurement are left out; the table names them. `path` is replaced if it exists.
    """
    # Slow to import, and needed nowhere else.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    twins = list(dict.fromkeys(row["twin"] for row in rows))
    figure = Figure(figsize=(6 * len(twins), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, twin in zip(figure.subplots(1, len(twins), squeeze=False)[0], twins, strict=True):
        own = [row for row in rows if row["twin"] == twin and row["status"] == "ok"]
        curves: dict[str, list[Row]] = {}
        for row in own:
            if row["slots"] is not None:
                parts = ("cache", row["policy"], row["read_mode"], _prefetch(row))
                name = " ".join(filter(None, parts)) if row["arm"] == "cache" else "stock mmap"
                curves.setdefault(name, []).append(row)
        limits: dict[str, list[Row]] = {}
        for name, points in curves.items():
            x, y = [row["cache_fraction"] for row in points], [row["tpot_ms"] for row in points]
            intervals = [row["tpot_ms_ci95"] or [row["tpot_ms"]] * 2 for row in points]
            # A bootstrap interval may lie on one side of the median by a rounding error.
            errors = [[max(0, t - low) for t, (low, _) in zip(y, intervals, strict=True)]]
            errors.append([max(0, high - t) for t, (_, high) in zip(y, intervals, strict=True)])
            dashed = "--" if points[0]["arm"] == "mmap" else "-"
            axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, linestyle=dashed, label=name)
            if points[0]["limit_ms"] is not None:
                limits.setdefault(points[0]["policy"], points)
        for index, (policy, points) in enumerate(limits.items()):
            x, y = [row["cache_fraction"] for row in points], [row["limit_ms"] for row in points]
            style = (":", "-.")[index % 2]
            axes.plot(x, y, color="black", linestyle=style, label=f"limit for the misses of {policy}")
        for row in own:
            if row["arm"] == "resident":
                label = "resident, repacked kernels" if row["repack"] else "resident"
                axes.axhline(row["tpot_ms"], color="grey", linestyle=":" if row["repack"] else "--", label=label)
        axes.set_title(twin)
        axes.set_xlabel("budget, slots / experts per layer")
        axes.set_ylabel("TPOT, ms = (last - first token) / (n - 1)")
        slots = {row["cache_fraction"]: f"{row['slots']}/{row['experts']}" for row in own if row["slots"] is not None}
        axes.set_xticks(list(slots), list(slots.values()))
        if own:
            axes.set_yscale("log", subs=(2, 5))
            for formatter in axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter:
                formatter("{x:g}")
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, format="png", dpi=120)
