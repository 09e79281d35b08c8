"""`remoe-edge convert`: a GGUF from a checkpoint, a router into one, other page boundaries, or two compared."""

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

from remoe_edge.gguf_io.convert import Plan, SliceAlignment, convert, plan_conversion
from remoe_edge.gguf_io.diff import Difference, TensorDifference, diff
from remoe_edge.gguf_io.from_hf import from_hf, plan_from_hf
from remoe_edge.gguf_io.layout import Tensor
from remoe_edge.progress import stderr_progress
from remoe_edge.sizes import format_size


@click.command("convert")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("router", type=click.Path(path_type=Path), required=False)
@click.option("--router", "router_option", type=click.Path(path_type=Path), help="The same as ROUTER.")
@click.option(
    "--quant",
    metavar="TYPE",
    help="Of the GGUF from a checkpoint: Q4_K_M, Q8_0, F16, ... [default: 16 bits, as the checkpoint]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF to write.")
@click.option(
    "--align",
    "alignment",
    type=int,
    metavar="BYTES",
    help="Start every tensor of the output on a multiple of this power of two; 4096 is a page. [default: as in BASE]",
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--diff", "compare", is_flag=True, help="Compare two GGUFs instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the differences as one JSON object.")
def command(
    base: Path,
    router: Path | None,
    router_option: Path | None,
    quant: str | None,
    output: Path | None,
    alignment: int | None,
    force: bool,
    dry_run: bool,
    compare: bool,
    as_json: bool,
) -> None:
    """Make a GGUF from a checkpoint, put a trained router into a GGUF, or tell two GGUFs apart.

    \b
    remoe-edge convert HF_FOLDER -o OUT.gguf --quant Q4_K_M [--router ROUTER]
    remoe-edge convert BASE.gguf ROUTER -o OUT.gguf
    remoe-edge convert BASE.gguf --align 4096 -o OUT.gguf
    remoe-edge convert --diff A.gguf B.gguf

    ROUTER is a .safetensors file, or the folder of a Hugging Face checkpoint, with router weights under their Hugging
    Face names. They replace those of BASE; all other tensor data stay as they are, byte for byte. BASE is never
    written to. It may be any part of a split GGUF (NAME-00001-of-00003.gguf); OUT is then split alike.

    --align, with a router or without, makes the expert cache's direct reads exact: no bytes before and after an expert.
    That needs experts whose size is a multiple too; what part of them is aligned is printed. All tensors are padded,
    because GGUF has one alignment for a file; --dry-run tells what that costs.

    BASE may also be the folder of a Hugging Face checkpoint. The pinned llama.cpp's own converter and llama-quantize
    then make the GGUF; that needs pip install 'remoe-edge[tune]'. Code that lies in the folder is never run.

    --diff prints the tensors and metadata in which A and B differ, and by how much. Differences are no failure: the
    exit status is 0.
    """
    if router is not None and router_option is not None:
        raise click.UsageError("ROUTER is given twice.")
    router = router or router_option
    if compare:
        given = {
            "--router": router_option is not None,
            "--quant": quant is not None,
            "--output": output is not None,
            "--align": alignment is not None,
            "--force": force,
            "--dry-run": dry_run,
        }
        for flag in (flag for flag, is_given in given.items() if is_given):
            raise click.UsageError(f"{flag} has no effect with --diff.")
        if router is None:
            raise click.UsageError("--diff compares two GGUFs; name another one.")
        with _progress("comparing") as progress:
            difference = diff(base, router, progress=progress)
        click.echo(json.dumps(dataclasses.asdict(difference)) if as_json else _difference_text(difference))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if base.is_dir():
        _from_checkpoint(base, output, quant, router, alignment, force, dry_run, as_json)
        return
    if quant is not None:
        raise click.UsageError("--quant is for a Hugging Face folder; llama-quantize quantizes a GGUF.")
    if router is None and alignment is None:
        raise click.UsageError("Missing argument 'ROUTER'. To change the layout alone, give --align.")
    if dry_run:
        plan = plan_conversion(base, router, output, alignment=alignment, force=force)
    else:
        with _progress("writing") as progress:
            plan = convert(base, router, output, alignment=alignment, force=force, progress=progress)
    slices = plan.slice_alignment() if alignment is not None else None
    if as_json:
        click.echo(json.dumps(_plan_object(plan, slices)))
    elif dry_run:
        click.echo(_plan_text(plan, slices))
    else:
        for file in plan.files:
            click.echo(f"Wrote {file.target} ({format_size(file.size)}).", err=True)
        if router is None:
            click.echo(f"{format_size(plan.copied_bytes)} of tensors copied unchanged.", err=True)
        else:
            click.echo(
                f"{len(plan.replacements)} router tensors replaced, {format_size(plan.copied_bytes)} of other tensors "
                f"copied unchanged; router sha256 {plan.metadata['remoe.router.sha256']}",
                err=True,
            )
        if slices:
            click.echo(_slices_text(slices), err=True)


def _from_checkpoint(
    folder: Path,
    output: Path,
    quant: str | None,
    router: Path | None,
    alignment: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if dry_run:
        plan = plan_from_hf(folder, output, quant=quant, router=router, alignment=alignment, force=force)
    else:
        with stderr_progress() as report:
            plan = from_hf(folder, output, quant=quant, router=router, alignment=alignment, force=force, report=report)
    written = None if dry_run else output.stat().st_size
    model = plan.checkpoint
    if as_json:
        described = {
            "architecture": model.architecture,
            "parameters": model.parameters,
            "moe_layers": model.moe_layers,
            "files": [str(file) for file in model.files],
            "output": str(output),
            "quant": plan.quant,
            "router": str(router) if router is not None else None,
            "alignment": alignment,
            "estimated_output_bytes": plan.output_bytes,
            "estimated_disk_bytes": plan.disk_bytes,
            "output_bytes": written,
        }
        click.echo(json.dumps(described))
    elif written is None:
        click.echo(
            f"{model.architecture}, {model.parameters:,} parameters in {len(model.files)} files, "
            f"{model.moe_layers or 'no'} MoE layers\n"
            f"output {output}, {plan.quant}, about {format_size(plan.output_bytes)}; "
            f"about {format_size(plan.disk_bytes)} of disk are needed while it is made"
        )
    else:
        router_text = f", router from {router}" if router is not None else ""
        click.echo(f"Wrote {output} ({format_size(written)}, {plan.quant}{router_text}).", err=True)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with speed and time left on stderr, when someone is looking."""
    columns = TextColumn(verb), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plan_object(plan: Plan, slices: SliceAlignment | None) -> dict[str, Any]:
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
        "expert_slices": dataclasses.asdict(slices) if slices else None,
        "copied_bytes": plan.copied_bytes,
        "input_bytes": plan.input_bytes,
        "output_bytes": plan.output_bytes,
    }


def _plan_text(plan: Plan, slices: SliceAlignment | None) -> str:
    lines = [f"{len(plan.replacements)} router tensors replaced:"] if plan.replacements else []
    for replacement in plan.replacements:
        old, new, router = replacement.old, replacement.new, replacement.router
        lines.append(f"  {_tensor_text(old)} -> {new.type.name}, from {router.key} ({router.dtype})")
    if plan.replacements and plan.kept:
        lines.append(f"{len(plan.kept)} router tensors kept, because the new router has none: {', '.join(plan.kept)}")
    other = "other " if plan.replacements else ""
    lines.append(f"{format_size(plan.copied_bytes)} of {other}tensors copied unchanged")
    if slices:
        lines.append(_slices_text(slices))
    lines.append("metadata written:")
    lines += [f"  {key} = {value!r}" for key, value in plan.metadata.items()]
    growth = plan.output_bytes - plan.input_bytes
    lines.append(f"input, {format_size(plan.input_bytes)} in all; output {growth:+} bytes")
    lines.append(f"output, {format_size(plan.output_bytes)} in all:")
    lines += [f"  {file.target} ({format_size(file.size)})" for file in plan.files]
    return "\n".join(lines)


def _slices_text(slices: SliceAlignment) -> str:
    text = (
        f"{slices.aligned} of {slices.slices} expert slices start on a multiple of {slices.alignment} "
        f"(before: {slices.aligned_before})"
    )
    if odd := [size for size in slices.slice_bytes if size % slices.alignment]:
        text += f"; slices of {', '.join(map(str, odd))} bytes are no multiple of it, only their tensors are aligned"
    return text


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
