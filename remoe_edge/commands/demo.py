"""`remoe-edge demo`: the main job on a model that is made on the spot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import click

from remoe_edge.commands.bench import print_table
from remoe_edge.commands.report import report_writer
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.measure.demo import run_demo
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.sizes import format_size

_DEFAULT_NAME = "remoe-demo"
_TITLE = "Twin of OLMoE-1B-7B (real routing, random weights), before and after a made-up router change"


@click.command("demo")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.html, report.png and results.jsonl. [default: remoe-demo, or the next free remoe-demo-N]",
)
@click.option("--force", is_flag=True, help="Overwrite existing results in --output.")
def command(output: Path | None, force: bool) -> None:
    """Build the runtime, make a model, export a changed router into it, and measure both in little memory.

    The model is a twin of OLMoE-1B-7B, about 1 GB, kept in the cache folder: it has the real model's routing and shapes
    with smaller experts and random weights. Times, reads and hits are real; its text means nothing. The router change
    is made up, too: it shows the way of a tuned router into a GGUF, not what tuning gains.

    Decodes with three budgets of the expert cache and with stock llama.cpp's mmap under one memory limit, and with all
    experts in memory without it. All runs of a model must put out the same tokens from the same logits; the exit status
    is 1 if they do not. Prints the folder with the report. Minutes the first time, for the build; then less than two.
    """
    if force and output is None:
        raise click.UsageError("--force has no effect without --output.")
    folder = output or free_folder()
    report_paths = {"html": folder / "report.html", "png": folder / "report.png"}
    rows_path = folder / "results.jsonl"
    for path in *report_paths.values(), rows_path:
        refuse_existing(path, force)
    folder.mkdir(parents=True, exist_ok=True)
    with stderr_progress() as report:
        ensure_runtime(report=report)
        demo = run_demo(report)
    with atomic_output(rows_path, force=force) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in demo.result.rows))
    for form, path in report_paths.items():
        with atomic_output(path, force=force) as temporary:
            report_writer(demo.result.rows, _TITLE, form)(temporary)
    print_table(demo.result.rows, demo.result.notes)
    limits = {row["memory_limit_bytes"] for row in demo.result.rows if row["arm"] != "resident"}
    limited = f"under a memory limit of {format_size(demo.memory_limit)}" if None not in limits else "without a limit"
    click.echo(
        f"base.gguf is a twin of OLMoE-1B-7B: real routing, random weights. tuned.gguf is base.gguf with a made-up "
        f"router change, exported by `remoe-edge convert`. Cache and mmap runs were {limited}.\n"
        f"Identical output (all tokens, all logits) of each model in all {len(demo.result.rows) // 2} runs: yes",
        err=True,
    )
    click.echo(folder)


def free_folder() -> Path:
    """The first of remoe-demo, remoe-demo-2, ... that does not exist."""
    names = itertools.chain([_DEFAULT_NAME], (f"{_DEFAULT_NAME}-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())
