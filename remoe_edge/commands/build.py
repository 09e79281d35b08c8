import json
from dataclasses import asdict
from pathlib import Path

import click

from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import BuildOptions, check_runtime, ensure_runtime


@click.command()
@click.option(
    "--source",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Build this llama.cpp checkout (a copy of it) instead of the pinned one.",
)
@click.option(
    "--cuda", is_flag=True, help="Build the CUDA backend too; CUDAARCHS chooses the GPU, by default this machine's."
)
@click.option(
    "--jobs",
    "-j",
    metavar="N",
    type=click.IntRange(min=1),
    help="Compilations to run at once. [default: what CPUs and memory allow]",
)
@click.option("--clean", is_flag=True, help="Delete every cached runtime and compile afresh.")
@click.option(
    "--check",
    is_flag=True,
    help="Only say whether the installed runtime matches the sources; exit with 1 if it does not.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    ctx: click.Context, source: Path | None, cuda: bool, jobs: int | None, clean: bool, check: bool, as_json: bool
) -> None:
    """Build the patched llama.cpp and install llama-cpp-python on it.

    The runtime is compiled once and kept in ~/.cache/remoe-edge (or $REMOE_EDGE_CACHE); every later call and every
    other virtual environment takes it from there. Prints the runtime's folder.
    """
    options = BuildOptions(cuda=cuda, source=source.resolve() if source is not None else None, jobs=jobs, clean=clean)
    if check:
        differences = check_runtime(options)
        if as_json:
            click.echo(json.dumps({"matches": not differences, "differences": differences}))
        else:
            for difference in differences:
                click.echo(difference)
            click.echo(
                "run remoe-edge build to bring it up to date"
                if differences
                else "the installed runtime matches the sources",
                err=True,
            )
        ctx.exit(1 if differences else 0)
    with stderr_progress() as report:
        runtime = ensure_runtime(options, report)
    if as_json:
        click.echo(
            json.dumps({"root": str(runtime.root), "wheel": str(runtime.wheel), "manifest": asdict(runtime.manifest)})
        )
    else:
        click.echo(runtime.root)
