"""``remoe-edge plan``: what fits into some memory, and what to expect of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.device.disk import disk_of
from remoe_edge.errors import RemoeError
from remoe_edge.measure.plan import STEP, Option, Plan, make_plan
from remoe_edge.progress import stderr_progress
from remoe_edge.routing.trace import load_trace
from remoe_edge.sizes import format_size, parse_size

_TABLE_WIDTH = 160


@click.command("plan")
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--memory", metavar="SIZE", help="For everything (6GiB). [default: what is free now]")
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Context.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Routing of this model, from `remoe-edge run --trace`. [default: packaged traces of other models]",
)
@click.option(
    "--storage",
    type=click.Path(path_type=Path, exists=True),
    help="Measure the storage of this file or folder instead of the model's own.",
)
@click.option("--storage-bandwidth", metavar="SIZE", help="Bytes per second, known already (2.5GB).")
@click.option(
    "--resident-ms",
    metavar="MS",
    type=click.FloatRange(min=0, min_open=True),
    help="TPOT with all experts in memory, known already.",
)
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: Path,
    memory: str | None,
    n_ctx: int,
    trace: Path | None,
    storage: Path | None,
    storage_bandwidth: str | None,
    resident_ms: float | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Tell what of MODEL, a GGUF, fits into memory, which budget and policy to use, and what TPOT to expect.

    \b
    remoe-edge plan model.gguf --memory 6GiB --trace trace.npz

    The storage is measured with reads of the size that the expert cache makes. T_resident is measured with a short run
    if the whole model fits into what is free now, else predicted from the speed of the memory. Nothing here measures
    the budgets themselves: `remoe-edge bench` does.
    """
    if storage is not None and storage_bandwidth is not None:
        raise click.UsageError("--storage has no effect with --storage-bandwidth.")
    if threads is not None and resident_ms is not None:
        raise click.UsageError("--threads has no effect with --resident-ms.")
    bandwidth = parse_size(storage_bandwidth.removesuffix("/s")) if storage_bandwidth else None
    if bandwidth == 0:
        raise RemoeError("a storage bandwidth of 0 reads nothing; give bytes per second, such as 2.5GB")
    with stderr_progress() as report:
        plan = make_plan(
            model,
            memory=parse_size(memory) if memory is not None else None,
            n_ctx=n_ctx,
            trace=load_trace(trace) if trace is not None else None,
            storage=storage,
            storage_bytes_per_s=bandwidth,
            resident_ms=resident_ms,
            n_threads=threads,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(plan.to_json()))
    else:
        _print(plan, storage or model)


def _print(plan: Plan, storage: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_TABLE_WIDTH)

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    memory = plan.memory
    line(
        f"{plan.model.name}: {plan.layers} MoE layers, top {plan.top_k} of {plan.experts} experts, "
        f"{format_size(plan.expert_bytes)} in all"
    )
    line(
        f"Memory: {format_size(memory.total)} = dense weights {format_size(memory.dense)} + KV cache "
        f"{format_size(memory.kv)} ({plan.n_ctx} tokens) + compute buffers {format_size(memory.compute)} (estimate) + "
        f"{format_size(memory.reserve)} left alone + {format_size(memory.cache)} for the expert cache "
        f"(floor {format_size(plan.floor)})"
    )
    line(_storage_line(plan, storage))
    line(_resident_line(plan))
    if plan.own_trace:
        line(f"Hit rates: {plan.traces[0]}, its second half.")
    else:
        line(
            f"Hit rates: of {plan.traces[0]}, at the same part of the experts; in brackets the range over "
            f"{len(plan.traces)} models. "
            "This model's own may lie outside: record them with `remoe-edge run --trace`."
        )
    console.print(_table(plan))
    others = ", ".join(f"{name} {rate:.1%}" for name, rate in plan.policies.items())
    line(f"Policy {plan.policy} (hits at the recommended budget: {others}).")
    line(f'Use: {shlex.join(plan.command)} -p "..."')
    line(_next_line(plan))


def _storage_line(plan: Plan, path: Path) -> str:
    speed = f"Storage: {plan.storage_bytes_per_s / 1e9:.2f} GB/s"
    if plan.storage is None:
        return f"{speed}, given"
    disk = disk_of(path.resolve())
    way = "past the page cache" if plan.storage.direct else "through the page cache, which may flatter it"
    return (
        f"{speed}, measured: random reads of {format_size(plan.storage.read_bytes)}, {plan.storage.depth} at once, "
        + way
        + (f" ({disk.kind})" if disk else "")
    )


def _resident_line(plan: Plan) -> str:
    resident = plan.resident
    if resident.source == "predicted" and resident.read_bytes and resident.bytes_per_s:
        return (
            f"T_resident: at least {resident.ms:.1f} ms, predicted ({resident.note}): a token reads "
            f"{format_size(resident.read_bytes)} of memory at {resident.bytes_per_s / 1e9:.1f} GB/s; computing may "
            "take longer"
        )
    return f"T_resident: {resident.ms:.1f} ms, {resident.source}"


def _table(plan: Plan) -> Table:
    table = Table(
        caption="TPOT: from max(T_resident, bytes / bandwidth) at the highest hit rate to T_resident + bytes / "
        "bandwidth at the lowest; limits, not a measurement"
    )
    for name in ("budget", "slots", "memory", "fits", "hit rate", "MB/token", "TPOT ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for option in plan.options:
        rate = f"{option.hit_rate:.1%}"
        if option.hit_rate_low < option.hit_rate_high:
            rate += f" ({option.hit_rate_low * 100:.0f} - {option.hit_rate_high * 100:.0f})"
        here = option.slots == plan.recommended.slots
        table.add_row(
            format_size(option.budget),
            f"{option.slots}",
            format_size(option.memory),
            "recommended" if here else "yes" if option.fits else "no",
            rate,
            f"{option.bytes_per_token / 1e6:.1f}",
            _tpot(option),
            style="bold" if here else None,
        )
    return table


def _next_line(plan: Plan) -> str:
    step, now, then = format_size(STEP), plan.recommended, plan.next
    if then is None:
        return f"The next {step} would buy nothing: all experts are held."
    if then.slots == now.slots:
        return f"The next {step} would buy nothing: they are less than one slot in every layer."
    return (
        f"The next {step} would buy: {now.slots} -> {then.slots} slots, "
        f"hits {now.hit_rate:.1%} -> {then.hit_rate:.1%}, "
        f"{now.bytes_per_token / 1e6:.1f} -> {then.bytes_per_token / 1e6:.1f} MB per token, "
        f"TPOT {_tpot(now)} -> {_tpot(then)} ms"
    )


def _tpot(option: Option) -> str:
    return f"{option.limit_ms:.1f} - {option.no_overlap_ms:.1f}"
