"""``remoe-edge simulate``: hit rates of an expert cache on a routing trace."""

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.progress import stderr_progress
from remoe_edge.routing.policies import POLICIES
from remoe_edge.routing.simulate import Simulation, simulate
from remoe_edge.routing.trace import Trace, load_trace, packaged_trace


@click.command("simulate")
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Slots per layer; repeatable. Default: 1/8, 1/4, 3/8 and 1/2 of the experts.",
)
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), multiple=True, help="Policy; repeatable. Default: all of them."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON array.")
def command(trace: Path | None, slots: tuple[int, ...], policy: tuple[str, ...], as_json: bool) -> None:
    """Tell which part of the experts a cache would find in its slots.

    TRACE is a routing trace (.npz), as `--expert-trace` records it; the packaged trace of OLMoE-1B-7B by default. The
    simulated cache follows the rules of the runtime's, so its counters equal those of a decode run on the same trace.
    "next-use" evicts the expert that it expects back last, as it has learned from the trace so far, "lfu" the one with
    the lowest use count, decayed with a half-life of 16 tokens, "lru" the least recently used one, "belady" the one
    whose next use is farthest ahead, which no real cache can know.
    """
    loaded = packaged_trace() if trace is None else load_trace(trace)
    jobs = [(n, name) for n in slots or _default_slots(loaded) for name in policy or POLICIES]
    rows = []
    with stderr_progress() as report:
        for done, (n, name) in enumerate(jobs):
            report("simulating", done / len(jobs))
            rows.append(simulate(loaded, n, name))
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]")
    else:
        console = Console()
        reuse = rows[0].reuse_rate
        console.print(
            f"{loaded.tokens} tokens, {loaded.layers} layers, top {loaded.top_k} of {loaded.experts} experts, "
            f"reuse rate {'unknown' if reuse is None else f'{reuse:.1%}'}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_table(rows))


def _default_slots(trace: Trace) -> list[int]:
    return sorted({max(trace.top_k, trace.experts * eighths // 8) for eighths in (1, 2, 3, 4)})


def _table(rows: list[Simulation]) -> Table:
    table = Table()
    for column in ("slots", "policy", "hit rate", "hits", "misses", "evictions"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            str(row.slots), row.policy, f"{row.hit_rate:.1%}", str(row.hits), str(row.misses), str(row.evictions)
        )
    return table
