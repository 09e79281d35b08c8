"""`remoe-edge demo`: the main job on the model that comes with the package."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import click

from remoe_edge.commands.bench import print_table
from remoe_edge.commands.report import report_writer
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.measure.demo import run_demo, summary
from remoe_edge.progress import stderr_progress
from remoe_edge.routing.trace import save_trace
from remoe_edge.runtime.build import ensure_runtime

_DEFAULT_NAME = "remoe-demo"
_TITLE = "Routing of the demo model, base and tuned, in twins with experts of OLMoE's size"


@click.command("demo")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report, rows and traces. [default: remoe-demo, or the next free remoe-demo-N]",
)
@click.option("--tune", is_flag=True, help="Tune the router here instead of taking the packaged one; needs torch.")
@click.option("--force", is_flag=True, help="Overwrite existing results in --output.")
def command(output: Path | None, tune: bool, force: bool) -> None:
    """Decode with the packaged model, base and tuned router, under the expert cache, and say what tuning gained.

    The model is small (12 M parameters, 8 layers of 32 experts) and real: trained from scratch, its router tuned by
    `remoe-edge tune`. Its experts are too small to keep a disk busy, so the routing of its own output is also replayed
    by twins whose experts have the size of OLMoE's (random weights, about 1 GB each, kept in the cache folder), with
    stock llama.cpp's mmap beside them under one memory limit.

    All runs of a model must put out the same tokens from the same logits; the exit status is 1 if they do not. Prints
    the folder with the report. About five minutes once the runtime is built.
    """
    if force and output is None:
        raise click.UsageError("--force has no effect without --output.")
    folder = output or free_folder()
    report_paths = {"html": folder / "report.html", "png": folder / "report.png"}
    rows_path = folder / "results.jsonl"
    trace_paths = folder / "base.npz", folder / "tuned.npz"
    for path in *report_paths.values(), rows_path, *trace_paths:
        refuse_existing(path, force)
    folder.mkdir(parents=True, exist_ok=True)
    with stderr_progress() as report:
        ensure_runtime(report=report)
        demo = run_demo(report, tune=tune, folder=folder)
    rows = [*demo.twins.rows, *demo.mmap.rows, *demo.real.rows]
    with atomic_output(rows_path, force=force) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for form, path in report_paths.items():
        with atomic_output(path, force=force) as temporary:
            report_writer(demo.twins.rows, _TITLE, form)(temporary)
    for trace, path in zip(demo.traces, trace_paths, strict=True):
        save_trace(trace, path, force=force)
    notes = list(dict.fromkeys([*demo.real.notes, *demo.twins.notes, *demo.mmap.notes]))
    print_table(rows, notes)
    for line in summary(demo):
        click.echo(line, err=True)
    click.echo(f"Identical output (all tokens, all logits) of each model in all {len(rows)} arms: yes", err=True)
    click.echo(folder)


def free_folder() -> Path:
    """The first of remoe-demo, remoe-demo-2, ... that does not exist."""
    names = itertools.chain([_DEFAULT_NAME], (f"{_DEFAULT_NAME}-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())
