"""`remoe-edge compare`: what changed between two benchmarks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.measure.compare import Comparison, Comparisons, compare_benchmarks
from remoe_edge.measure.rows import Row, read_rows
from remoe_edge.measure.stats import Change
from remoe_edge.report.labels import DASH, format_ms, row_label

_PATH = click.Path(path_type=Path, exists=True, dir_okay=False)
_TABLE_WIDTH = 140


@click.command("compare")
@click.argument("old", metavar="OLD.jsonl", type=_PATH)
@click.argument("new", metavar="NEW.jsonl", type=_PATH)
@click.option(
    "--margin",
    metavar="PERCENT",
    type=click.FloatRange(0, 100, min_open=True),
    default=3.0,
    show_default=True,
    help="Differences up to this do not matter: an arm whose whole interval lies within is equivalent.",
)
@click.option("--anyway", is_flag=True, help="Compare although power mode, prompts or output length differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(old: Path, new: Path, margin: float, anyway: bool, as_json: bool) -> None:
    """Say what changed from OLD to NEW, two results of `remoe-edge bench`, and whether it is significant.

    \b
    remoe-edge compare before.jsonl after.jsonl

    Arms are matched by what they are. For each: the ratio of TPOT (Hodges-Lehmann estimate, 95 % bootstrap interval),
    and the p-value of a rank sum test over the runs, within each prompt. "equivalent" means that the interval lies
    within the margin; "slower" and "faster" that it does not, and p < 0.05. Of one prompt, fewer than four repetitions
    on each side cannot be significant. One in twenty equal arms gets p < 0.05 by chance.
    """
    rows_old, rows_new = read_rows(old), read_rows(new)
    result = compare_benchmarks(rows_old, rows_new, margin=margin / 100, anyway=anyway)
    if as_json:
        click.echo(json.dumps(_as_json(result, rows_old)))
    else:
        _print(result, rows_old, margin)


def _as_json(result: Comparisons, rows: list[Row]) -> dict[str, Any]:
    return {
        "arms": [
            {
                "arm": row_label(pair.old, rows),
                "tpot_ms": [pair.old["tpot_ms"], pair.new["tpot_ms"]],
                "tpot": asdict(pair.tpot) if pair.tpot else None,
                "energy": asdict(pair.energy) if pair.energy else None,
                "verdict": pair.verdict,
                "conditions": pair.conditions,
                "same_output": pair.same_output,
                "hit_rate": [pair.old["hit_rate"], pair.new["hit_rate"]],
                "bytes_per_token": [pair.old["bytes_per_token"], pair.new["bytes_per_token"]],
            }
            for pair in result.pairs
        ],
        "only_old": [row_label(row, rows) for row in result.only_old],
        "only_new": [row_label(row, result.only_new) for row in result.only_new],
    }


def _print(result: Comparisons, rows: list[Row], margin: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_TABLE_WIDTH)
    energy = any(pair.energy for pair in result.pairs)
    table = Table(caption=f"ratio = new / old [95 % interval]; equivalent: within {margin:g} %; p: rank sum test")
    table.add_column("arm", overflow="fold")
    names = ("TPOT ms", "ratio", "p", "verdict", "hits", "MB/token", *(("J/token ratio",) if energy else ()), "output")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for pair in result.pairs:
        table.add_row(*_cells(pair, rows, energy))
    console.print(table)
    changed: dict[str, list[str]] = {}
    for pair in result.pairs:
        for condition in pair.conditions:
            changed.setdefault(condition, []).append(row_label(pair.old, rows))
    for condition, labels in changed.items():
        where = "" if len(labels) == len(result.pairs) else f" ({', '.join(labels)})"
        click.echo(f"Changed: {condition}{where}")
    for pair in result.pairs:
        for row, when in (pair.old, "old"), (pair.new, "new"):
            if row["status"] != "ok":
                click.echo(f"{row_label(pair.old, rows)}, {when}: {row['status']}: {row['reason']}")
        if pair.verdict == "too few runs" and pair.tpot:
            runs = " and ".join(map(str, pair.tpot.runs))
            click.echo(f"{row_label(pair.old, rows)}: {runs} runs cannot show a difference; take at least -r 4")
    for name, others in ("old", result.only_old), ("new", result.only_new):
        if others:
            click.echo(f"Only in {name}: {', '.join(row_label(row, others) for row in others)}")


def _cells(pair: Comparison, rows: list[Row], energy: bool) -> list[str]:
    old, new = pair.old, pair.new
    return [
        row_label(old, rows),
        _both(old["tpot_ms"], new["tpot_ms"], format_ms),
        _ratio(pair.tpot),
        f"{pair.tpot.p_value:.2g}" if pair.tpot else DASH,
        pair.verdict,
        _both(old["hit_rate"], new["hit_rate"], lambda value: f"{value:.1%}"),
        _both(old["bytes_per_token"], new["bytes_per_token"], lambda value: f"{value / 1e6:.1f}"),
        *([_ratio(pair.energy)] if energy else []),
        {True: "same", False: "differs", None: DASH}[pair.same_output],
    ]


def _both(old: float | None, new: float | None, form: Any) -> str:
    texts = [DASH if value is None else form(value) for value in (old, new)]
    return texts[0] if texts[0] == texts[1] else " \u2192 ".join(texts)


def _ratio(change: Change | None) -> str:
    if change is None:
        return DASH
    interval = f" [{change.ci95[0]:.3f}, {change.ci95[1]:.3f}]" if change.ci95 else ""
    return f"{change.ratio:.3f}{interval}"
