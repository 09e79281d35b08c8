"""Short names of rows: what they all have in common is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_edge.measure.rows import Row
from remoe_edge.sizes import format_size

MINUS, DASH = "\u2212", "\u2013"


def arm_name(row: Row, rows: Sequence[Row] = ()) -> str:
    """The arm, with what tells it from others of `rows`: "cache lru prefetch router", "mmap", "resident repacked"."""
    name = str(row["arm"])
    if row["arm"] == "cache":
        # Rows of older benchmarks do not say everything.
        for key, prefix in ("policy", ""), ("read_mode", ""), ("prefetch", "prefetch "):
            values = {other.get(key) for other in rows if other["arm"] == "cache" and other.get(key) is not None}
            if len(values) > 1 and row.get(key) is not None:
                name += f" {prefix}{row[key]}" if row[key] != "off" else " no prefetch"
        # Told even where all have it: the output is not the model's.
        if row.get("route_bias") is not None:
            name += f" route bias {row['route_bias']:g}" + (
                f" keep {row['route_keep']}" if row["route_keep"] != 1 else ""
            )
    elif row["kernels"] == "repack" or row.get("repack"):
        name += " repacked"
    return name


def budget_name(row: Row) -> str:
    """The budget in bytes where it is known, else as it was given; empty without one."""
    if row["budget_bytes"] is not None:
        return format_mib(row["budget_bytes"])
    return row["budget"] or ""


def row_label(row: Row, rows: Sequence[Row]) -> str:
    """A name that no other of `rows` has: "cache 880 MiB", with the model and the file where there are several."""
    label = " ".join(part for part in (arm_name(row, rows), budget_name(row)) if part)
    if len({other["model_path"] for other in rows}) > 1:
        label = f"{Path(row['model_path']).stem} {label}"
    if len({other.get("file") for other in rows}) > 1:
        label = f"{row['file']}: {label}"
    return label


def series_label(row: Row, rows: Sequence[Row]) -> str:
    """What the rows of one line over the budget have in common."""
    return row_label(row | {"budget_bytes": None, "budget": None}, rows)


def format_mib(size: int) -> str:
    """Bytes for people, without needless decimals: 880 MiB, 1.5 GiB."""
    if size >= 10 << 30 or (size >= 1 << 30 and size % (1 << 28) == 0):
        return f"{size / 2**30:.3g} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 << 20 else format_size(size)


def format_ms(value: float) -> str:
    """Milliseconds with three significant digits, without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
