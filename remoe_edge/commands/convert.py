"""`remoe-edge convert`: put a router into a GGUF, or tell two GGUFs apart."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from remoe_edge.gguf_io.convert import Plan, convert, plan_conversion
from remoe_edge.gguf_io.diff import Difference, TensorDifference, diff
from remoe_edge.gguf_io.layout import Tensor
from remoe_edge.sizes import format_size


@click.command("convert")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("router", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF to write.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--diff", "compare", is_flag=True, help="Compare two GGUFs instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the differences as one JSON object.")
def command(
    base: Path, router: Path, output: Path | None, force: bool, dry_run: bool, compare: bool, as_json: bool
) -> None:
    """Put a trained router into a GGUF, or tell two GGUFs apart.

    \b
    remoe-edge convert BASE.gguf ROUTER -o OUT.gguf
    remoe-edge convert --diff A.gguf B.gguf

    ROUTER is a .safetensors file, or the folder of a Hugging Face checkpoint, with router weights under their Hugging
    Face names. They replace those of BASE; all other tensor data stay as they are, byte for byte. BASE is never
    written to. It may be any part of a split GGUF (NAME-00001-of-00003.gguf); OUT is then split alike.

    --diff prints the tensors and metadata in which A and B differ, and by how much. Differences are no failure: the
    exit status is 0.
    """
    if compare:
        for flag, given in ("--output", output is not None), ("--force", force), ("--dry-run", dry_run):
            if given:
                raise click.UsageError(f"{flag} has no effect with --diff.")
        with _progress("comparing") as progress:
            difference = diff(base, router, progress=progress)
        click.echo(json.dumps(dataclasses.asdict(difference)) if as_json else _difference_text(difference))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if dry_run:
        plan = plan_conversion(base, router, output, force=force)
    else:
        with _progress("writing") as progress:
            plan = convert(base, router, output, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps(_plan_object(plan)))
    elif dry_run:
        click.echo(_plan_text(plan))
    else:
        for file in plan.files:
            click.echo(f"Wrote {file.target} ({format_size(file.size)}).", err=True)
        click.echo(
            f"{len(plan.replacements)} router tensors replaced, {format_size(plan.copied_bytes)} of other tensors "
            f"copied unchanged; router sha256 {plan.metadata['remoe.router.sha256']}",
            err=True,
        )


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with speed and time left on stderr, when someone is looking."""
    columns = TextColumn(verb), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plan_object(plan: Plan) -> dict[str, Any]:
    return {
        "files": [{"base": str(file.base.path), "output": str(file.target), "bytes": file.size} for file in plan.files],
        "replaced": [
            {
                "name": replacement.new.name,
                "shape": replacement.new.shape,
                "old_type": replacement.old.type.name,
                "new_type": replacement.new.type.name,
                "source": str(replacement.router.source.path),
                "key": replacement.router.key,
                "source_type": replacement.router.dtype,
            }
            for replacement in plan.replacements
        ],
        "kept": plan.kept,
        "metadata": plan.metadata,
        "copied_bytes": plan.copied_bytes,
        "output_bytes": plan.output_bytes,
    }


def _plan_text(plan: Plan) -> str:
    lines = [f"{len(plan.replacements)} router tensors replaced:"]
    for replacement in plan.replacements:
        old, new, router = replacement.old, replacement.new, replacement.router
        lines.append(f"  {_tensor_text(old)} -> {new.type.name}, from {router.key} ({router.dtype})")
    if plan.kept:
        lines.append(f"{len(plan.kept)} router tensors kept, because the new router has none: {', '.join(plan.kept)}")
    lines.append(f"{format_size(plan.copied_bytes)} of other tensors copied unchanged")
    lines.append("metadata written:")
    lines += [f"  {key} = {value!r}" for key, value in plan.metadata.items()]
    lines.append(f"output, {format_size(plan.output_bytes)} in all:")
    lines += [f"  {file.target} ({format_size(file.size)})" for file in plan.files]
    return "\n".join(lines)


def _tensor_text(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.type.name} {list(tensor.shape)}"


def _difference_text(difference: Difference) -> str:
    lines = [_tensor_difference_text(tensor) for tensor in difference.tensors]
    lines += [
        f"{entry.key}: {'absent' if entry.a is None else entry.a} -> {'absent' if entry.b is None else entry.b}"
        for entry in difference.metadata
    ]
    lines.append(
        f"{len(difference.tensors)} tensors differ, {difference.equal_tensors} are the same; "
        f"{len(difference.metadata)} metadata keys differ"
    )
    return "\n".join(lines)


def _tensor_difference_text(tensor: TensorDifference) -> str:
    a = "absent" if tensor.shape_a is None else f"{tensor.type_a} {list(tensor.shape_a)}"
    b = "absent" if tensor.shape_b is None else f"{tensor.type_b} {list(tensor.shape_b)}"
    parts = [a if a == b else f"{a} -> {b}"]
    if tensor.differing_bytes is not None:
        parts.append(f"{tensor.differing_bytes} bytes differ")
    if tensor.max_abs is not None:
        parts.append(f"max |b - a| {tensor.max_abs:.6g}")
    if tensor.relative_l2 is not None:
        parts.append(f"|b - a| / |a| {tensor.relative_l2:.6g}")
    return f"{tensor.name}: {', '.join(parts)}"
