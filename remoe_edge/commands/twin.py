"""``remoe-edge twin``: a model with random weights that routes as a trace says."""

from pathlib import Path

import click

from remoe_edge.gguf_io.layout import DEFAULT_ALIGNMENT
from remoe_edge.progress import stderr_progress
from remoe_edge.routing.shapes import ARCHITECTURES
from remoe_edge.routing.trace import excerpt, load_trace, packaged_trace
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
@click.option("--tokens", type=click.IntRange(min=1), help="Replay N tokens only.", metavar="N")
@click.option(
    "--sequence",
    type=int,
    default=0,
    show_default=True,
    metavar="S",
    help="Begin with the first token of this sequence of the trace; negative numbers count from the end.",
)
@click.option(
    "--align",
    type=int,
    default=DEFAULT_ALIGNMENT,
    show_default=True,
    metavar="BYTES",
    help="Start every tensor on a multiple of this; experts whose size is a multiple of it start on one too.",
)
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
    tokens: int | None,
    sequence: int,
    align: int,
    seed: int,
    force: bool,
) -> None:
    """Write a model that replays a routing trace: real routing, real shapes, random weights.

    TRACE is a routing trace (.npz), as `--expert-trace` records it; the packaged trace of OLMoE-1B-7B by default.
    Greedy decoding from the prompt "w00000" visits the experts of the trace, step by step, in any build of llama.cpp;
    a prompt "w00000w00001..." replays steps as prefill. The same arguments give the same file.

    \b
    remoe-edge twin trace.npz --arch deepseek2 --ff 1408 --layers 18 --sequence -8 --tokens 128 -o twin.gguf

    All layers together may have no more experts than the hidden size; --layers makes a model with fewer.
    """
    loaded = excerpt(packaged_trace() if trace is None else load_trace(trace), sequence=sequence, tokens=tokens)
    twin = plan_twin(loaded, arch=arch, hidden=hidden, ff=ff, quant=quant, layers=layers, seed=seed, alignment=align)
    click.echo(f"{output} takes {format_size(twin.nbytes)} ({twin.nbytes} bytes of tensors).", err=True)
    with stderr_progress() as report:
        write_twin(twin, output, force=force, progress=lambda written: report("writing", written / twin.nbytes))
    click.echo(f"Wrote {output}: {loaded.tokens} steps, from 'w00000' on.", err=True)
