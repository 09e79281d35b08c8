"""`remoe-edge report`: results of benchmarks for people."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing, same_file
from remoe_edge.measure.rows import Row, read_rows

_FORMATS = {".html": "html", ".htm": "html", ".png": "png", ".md": "markdown", ".markdown": "markdown"}


@click.command("report")
@click.argument(
    "results",
    metavar="RESULTS...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write; .html, .png or .md says as what. [default: the first RESULTS with .html]",
)
@click.option("--html", "form", flag_value="html", help="Write a web page, whatever the name of --output.")
@click.option("--png", "form", flag_value="png", help="Write a picture.")
@click.option("--markdown", "form", flag_value="markdown", help="Write Markdown.")
@click.option("--title", metavar="TEXT", help="[default: from model and device]")
@click.option("--force", is_flag=True, help="Overwrite an existing --output.")
def command(results: tuple[Path, ...], output: Path | None, form: str | None, title: str | None, force: bool) -> None:
    """Turn RESULTS, the JSONL of `remoe-edge bench`, into a report.

    \b
    remoe-edge report results.jsonl -o report.html
    remoe-edge report before.jsonl after.jsonl --png -o both.png

    The page is one file that needs no network: time between tokens, TPOT against budget with the physical limit, bytes
    per token, hit rate per layer, power and energy where they were measured, and a table that can be sorted. Prints the
    path of what it wrote.
    """
    suffix = {"html": ".html", "png": ".png", "markdown": ".md", None: ".html"}[form]
    output = output or results[0].with_suffix(suffix)
    form = form or _FORMATS.get(output.suffix.lower())
    if form is None:
        raise click.UsageError(f"{output.name} does not say what to write; name it .html, .png or .md, or pass --html.")
    for path in results:
        if same_file(path, output):
            raise RemoeError(f"{output} is one of the results; choose another --output")
    refuse_existing(output, force)
    rows = _read(results)
    write = report_writer(rows, title or _title(rows), form)
    with atomic_output(output, force=force) as temporary:
        write(temporary)
    click.echo(output)


def report_writer(rows: list[Row], title: str, form: str) -> Callable[[Path], object]:
    """A function that writes the report as "html", "png" or "markdown" to a path."""
    # Drawing takes long to import.
    if form == "png":
        from remoe_edge.report.draw import write_png

        return partial(write_png, rows, title=title)
    if form == "html":
        from remoe_edge.report.page import html_report as to_text
    else:
        from remoe_edge.report.markdown import markdown_report as to_text
    return lambda path: path.write_text(to_text(rows, title=title), encoding="utf-8")


def _read(paths: tuple[Path, ...]) -> list[Row]:
    """The rows of all files; `file` says from which, by a name that no other file has."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return [row | {"file": name} for path, name in zip(paths, names, strict=True) for row in read_rows(path)]


def _title(rows: list[Row]) -> str:
    models = dict.fromkeys(Path(row["model_path"]).stem for row in rows)
    devices = dict.fromkeys(row["device"] for row in rows)
    return f"{' and '.join(models)} on {' and '.join(devices)}"
