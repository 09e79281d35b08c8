"""`remoe-edge doctor`: would a benchmark on this machine be valid?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remoe_edge.device.doctor import NOTE, OK, PROBLEM, Finding, Options, examine, valid
from remoe_edge.progress import stderr_progress

_WIDTH = 120
_STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


@click.command("doctor")
@click.argument("model", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Measure the drive that this folder lies on, with a temporary file of 1 GiB. [default: this folder]",
)
@click.option("--no-storage", is_flag=True, help="Do not measure the storage's speed: done in a second.")
@click.option(
    "--power-mode", metavar="NAME", help="The nvpmodel mode that is wanted. [default: MAXN or MAXN_SUPER; Jetson only]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: valid, and the findings.")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path | None,
    folder: Path | None,
    no_storage: bool,
    power_mode: str | None,
    as_json: bool,
) -> None:
    """Examine this machine: would a benchmark on it be valid?

    \b
    remoe-edge doctor model.gguf
    remoe-edge doctor --no-storage --json

    Looks at device, power mode, clocks, heat, load, memory, storage, sensors, the runtime and known traps. Each finding
    is "ok", a "note" (worth knowing; results hold) or a "problem" (a benchmark would not be valid), with what to do.
    The storage is measured on MODEL's experts, or on a temporary file.

    Exit status: 0 if a benchmark would be valid, 1 if there is a problem, 2 for wrong usage.
    """
    if model is not None and folder is not None:
        raise click.UsageError("--folder has no effect with a MODEL, which is measured instead.")
    if no_storage and folder is not None:
        raise click.UsageError("--folder has no effect with --no-storage.")
    options = Options(model=model, folder=folder or Path("."), storage=not no_storage, power_mode=power_mode)
    with stderr_progress() as report:
        findings = examine(options, report)
    if as_json:
        click.echo(json.dumps({"valid": valid(findings), "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    ctx.exit(0 if valid(findings) else 1)


def _print(findings: list[Finding]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.found)
        if finding.advice:
            said.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.topic, said)
    console.print(table)
    problems = sum(finding.level == PROBLEM for finding in findings)
    if problems:
        console.print(f"A benchmark here would not be valid: {problems} problem{'s' if problems > 1 else ''}.")
    else:
        console.print("A benchmark here would be valid.")
