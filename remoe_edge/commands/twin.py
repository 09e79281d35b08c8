"""``remoe-edge twin``: a model with random weights that routes as a trace says."""

from pathlib import Path

import click

from remoe_edge.progress import stderr_progress
from remoe_edge.routing.shapes import ARCHITECTURES
from remoe_edge.routing.trace import load_trace, packaged_trace
from remoe_edge.routing.twin import QUANTS, plan_twin, write_twin
from remoe_edge.sizes import format_size


@click.command("twin")
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The GGUF to write.")
@click.option("--arch", type=click.Choice(ARCHITECTURES), default="olmoe", show_default=True, help="Architecture.")
@click.option("--hidden", type=click.IntRange(min=1), default=2048, show_default=True, help="Hidden size.")
@click.option("--ff", type=click.IntRange(min=1), default=1024, show_default=True, help="Inner size of an expert.")
@click.option(
    "--quant",
    type=click.Choice(list(QUANTS), case_sensitive=False),
    default="Q4_0",
    show_default=True,
    help="Type of the expert weights.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Replay the first N MoE layers only.", metavar="N")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the weights.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
def command(
    trace: Path | None,
    output: Path,
    arch: str,
    hidden: int,
    ff: int,
    quant: str,
    layers: int | None,
    seed: int,
    force: bool,
) -> None:
    """Write a model that replays a routing trace: real routing, real shapes, random weights.

    TRACE is a routing trace (.npz), as `--expert-trace` records it; the packaged trace of OLMoE-1B-7B by default.
    Greedy decoding from the prompt "w00000" visits the experts of the trace, step by step, in any build of llama.cpp;
    a prompt "w00000w00001..." replays steps as prefill. The same arguments give the same file.
    """
    loaded = packaged_trace() if trace is None else load_trace(trace)
    twin = plan_twin(loaded, arch=arch, hidden=hidden, ff=ff, quant=quant, layers=layers, seed=seed)
    click.echo(f"{output} takes {format_size(twin.nbytes)} ({twin.nbytes} bytes of tensors).", err=True)
    with stderr_progress() as report:
        write_twin(twin, output, force=force, progress=lambda written: report("writing", written / twin.nbytes))
    click.echo(f"Wrote {output}: {loaded.tokens} steps, from 'w00000' on.", err=True)
