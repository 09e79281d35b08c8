"""``remoe-edge simulate``: hit rates of an expert cache on a routing trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.progress import Report, stderr_progress
from remoe_edge.routing.policies import POLICIES
from remoe_edge.routing.predict import bytes_per_token, check_model_of, predict_tpot
from remoe_edge.routing.simulate import CACHES, Simulation, miss_change, simulate_all
from remoe_edge.routing.trace import Trace, load_trace, packaged_trace
from remoe_edge.runtime.budget import ExpertGroup, cache_bytes, expert_groups, floor_bytes, slots_for
from remoe_edge.sizes import format_size, parse_size

_DEFAULT_POLICY = next(iter(POLICIES))
_TABLE_WIDTH = 160


@click.command("simulate")
@click.argument("traces", metavar="[TRACE]...", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Slots per layer; repeatable. Default: 1/8, 1/4, 3/8 and 1/2 of the experts.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="SIZE",
    help="What the runtime makes of a budget in bytes (880MiB); repeatable. Needs --model or --expert-bytes.",
)
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), multiple=True, help="Policy; repeatable. Default: all of them."
)
@click.option(
    "--cache",
    type=click.Choice(CACHES),
    default=CACHES[0],
    show_default=True,
    help="Where a sequence ends: the next one finds the cache as it is (a server), or empty (a process per request).",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GGUF whose experts these are: gives bytes per token.",
)
@click.option("--expert-bytes", metavar="SIZE", help="Instead of --model: bytes of one expert in one layer.")
@click.option(
    "--storage-bandwidth", metavar="SIZE", help="Bytes per second that the storage gives (2.5GB): predicts TPOT."
)
@click.option(
    "--resident-ms",
    metavar="MS",
    type=click.FloatRange(min=0, min_open=True),
    help="TPOT with all experts in memory, for the same.",
)
@click.option("--per-layer", is_flag=True, help="Show the hit rate of each layer, too.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw it (.png).")
@click.option("--force", is_flag=True, help="Overwrite an existing --plot.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON array.")
def command(
    traces: tuple[Path, ...],
    slots: tuple[int, ...],
    budgets: tuple[str, ...],
    policy: tuple[str, ...],
    cache: str,
    model: Path | None,
    expert_bytes: str | None,
    storage_bandwidth: str | None,
    resident_ms: float | None,
    per_layer: bool,
    plot: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Tell which part of the experts a cache would find in its slots.

    \b
    remoe-edge simulate trace.npz --budget 880MiB --budget 1.5G --model model.gguf \\
        --storage-bandwidth 2.5GB --resident-ms 33 --plot misses.png

    TRACE is a routing trace (.npz), as `--expert-trace` records it; the packaged trace of OLMoE-1B-7B by default. Of
    several traces (base and tuned router, say) the later ones are compared with the first. The simulated cache follows
    the rules of the runtime's, so its counters equal those of a decode run on the same trace. "next-use" evicts the
    expert that it expects back last, as it has learned from the trace so far, "lfu" the one with the lowest use count,
    decayed with a half-life of 16 tokens, "lru" the least recently used one, "belady" the one whose next use is
    farthest ahead, which no real cache can know.

    TPOT is given as its limits: max(T_resident, missed bytes / bandwidth), if reads and compute overlap wholly, and the
    sum of both, if they do not at all.
    """
    _check_flags(budgets, model, expert_bytes, storage_bandwidth, resident_ms, plot, force)
    if plot is not None:
        refuse_existing(plot, force)
    loaded = [load_trace(path) for path in traces] if traces else [packaged_trace()]
    groups = _groups(loaded, model, expert_bytes)
    bandwidth = parse_size(storage_bandwidth.removesuffix("/s")) if storage_bandwidth else None
    if bandwidth == 0:
        raise RemoeError("a storage bandwidth of 0 reads nothing; give bytes per second, such as 2.5GB")
    names = policy or tuple(POLICIES)
    runs = [(n, name) for n in slots or (() if budgets else _default_slots(loaded)) for name in names]
    runs += [(_budget_slots(groups, text, name), name) for text in budgets for name in names]
    runs = sorted(dict.fromkeys(runs), key=lambda run: run[0])
    with stderr_progress() as report:
        results = [
            simulate_all(trace, runs, cache=cache, report=_part(report, index, len(loaded)))
            for index, trace in enumerate(loaded)
        ]
    rows = [
        _row(result, base, groups, resident_ms, bandwidth)
        for own in results
        for result, base in zip(own, results[0], strict=True)
    ]
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    else:
        _print(loaded, rows, per_layer)
    if plot is not None:
        # Slow to import.
        from remoe_edge.report.simulation import write_png

        title = f"{Path(loaded[0].origin).name}: top {loaded[0].top_k} of {loaded[0].experts} experts, {cache} cache"
        with atomic_output(plot, force=force) as temporary:
            write_png(rows, temporary, title=title)


def _check_flags(
    budgets: Sequence[str],
    model: Path | None,
    expert_bytes: str | None,
    storage_bandwidth: str | None,
    resident_ms: float | None,
    plot: Path | None,
    force: bool,
) -> None:
    sized = model is not None or expert_bytes is not None
    if model is not None and expert_bytes is not None:
        raise click.UsageError("--model and --expert-bytes exclude each other.")
    if budgets and not sized:
        raise click.UsageError("--budget needs the size of an expert: give --model or --expert-bytes.")
    for flag, given in ("--storage-bandwidth", storage_bandwidth), ("--resident-ms", resident_ms):
        if given is not None and not sized:
            raise click.UsageError(f"{flag} has no effect without --model or --expert-bytes.")
    if (storage_bandwidth is None) != (resident_ms is None):
        raise click.UsageError("a prediction of TPOT needs both --storage-bandwidth and --resident-ms.")
    if force and plot is None:
        raise click.UsageError("--force has no effect without --plot.")


def _part(report: Report, index: int, count: int) -> Report:
    return lambda stage, fraction: report(stage, (index + (fraction or 0)) / count)


def _default_slots(traces: Sequence[Trace]) -> list[int]:
    top_k, experts = max(trace.top_k for trace in traces), max(trace.experts for trace in traces)
    return sorted({max(top_k, experts * eighths // 8) for eighths in (1, 2, 3, 4)})


def _groups(traces: Sequence[Trace], model: Path | None, expert_bytes: str | None) -> list[ExpertGroup] | None:
    """The MoE layers that the traces are of, with their sizes; None if these are not known."""
    if expert_bytes is not None:
        first = traces[0]
        size = parse_size(expert_bytes)
        if size == 0:
            raise RemoeError("an expert of 0 bytes is none; give the bytes of one expert in one layer")
        groups = [ExpertGroup(first.experts, first.top_k, ((0, size),))] * first.layers
    elif model is not None:
        groups = expert_groups(read_model(model))
    else:
        return None
    for trace in traces:
        check_model_of(trace, groups, str(model) if model else f"a model like that of {traces[0].origin}")
    return groups


def _budget_slots(groups: list[ExpertGroup] | None, text: str, policy: str) -> int:
    assert groups is not None
    # What no cache can know takes no memory; the default policy's is counted.
    policy = _DEFAULT_POLICY if policy == "belady" else policy
    slots = slots_for(groups, parse_size(text), policy)
    if slots == 0:
        raise RemoeError(
            f"a budget of {text} is below the floor of {format_size(floor_bytes(groups, policy))}, one token's experts "
            f"under policy {policy}; give more"
        )
    return slots


def _row(
    result: Simulation,
    base: Simulation,
    groups: list[ExpertGroup] | None,
    resident_ms: float | None,
    bandwidth: int | None,
) -> dict[str, Any]:
    row = result.row()
    policy = _DEFAULT_POLICY if result.policy == "belady" else result.policy
    row["budget_bytes"] = cache_bytes(groups, result.slots, policy) if groups else None
    read = bytes_per_token(result.layer_misses_per_token, [group.expert_bytes for group in groups]) if groups else None
    row["bytes_per_token"] = read
    tpot = predict_tpot(resident_ms, read, bandwidth) if read is not None and resident_ms and bandwidth else None
    row["limit_ms"] = tpot.limit_ms if tpot else None
    row["no_overlap_ms"] = tpot.no_overlap_ms if tpot else None
    change = miss_change(base, result) if base is not result else None
    row["misses_change"] = change.change if change else None
    row["misses_change_ci95"] = change.ci95 if change else None
    return row


def _print(traces: Sequence[Trace], rows: Sequence[dict[str, Any]], per_layer: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_TABLE_WIDTH)
    for trace in traces:
        reuse = next(row["reuse_rate"] for row in rows if row["trace"] == trace.origin)
        name = f"{trace.origin}: " if len(traces) > 1 else ""
        console.print(
            f"{name}{trace.tokens} tokens, {trace.layers} layers, top {trace.top_k} of {trace.experts} experts, "
            f"reuse rate {'unknown' if reuse is None else f'{reuse:.1%}'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.print(_table(rows))
    if per_layer:
        console.print(_layer_table(rows))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line for each number of slots and policy, under it the other traces with the same."""
    first = rows[0]
    several = len({row["trace"] for row in rows}) > 1
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "slots": lambda row: str(row["slots"]),
        "policy": lambda row: row["policy"],
        **({"trace": lambda row: Path(row["trace"]).name} if several else {}),
        "hit rate": lambda row: f"{row['hit_rate']:.1%}",
        "hits": lambda row: str(row["hits"]),
        "misses": lambda row: str(row["misses"]),
        "evictions": lambda row: str(row["evictions"]),
    }
    if first["bytes_per_token"] is not None:
        columns["budget"] = lambda row: format_size(row["budget_bytes"])
        columns["MB/token"] = lambda row: f"{row['bytes_per_token'] / 1e6:.1f}"
    if first["limit_ms"] is not None:
        columns["TPOT ms"] = lambda row: f"{row['limit_ms']:.1f} - {row['no_overlap_ms']:.1f}"
    if several:
        columns["misses change"] = _change
    caption = "misses change: miss rate against the first trace [95 % over sequences]" if several else None
    if first["limit_ms"] is not None:
        formula = "TPOT: max(T_resident, missed bytes / bandwidth) - sum of both; limits, not a measurement"
        caption = f"{caption}; {formula}" if caption else formula
    table = Table(caption=caption)
    for name in columns:
        table.add_column(name, justify="left" if name in ("policy", "trace") else "right")
    for row in sorted(rows, key=lambda row: int(row["slots"])) if not several else _interleaved(rows):
        table.add_row(*(text(row) for text in columns.values()))
    return table


def _interleaved(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {key: index for index, key in enumerate(dict.fromkeys((row["slots"], row["policy"]) for row in rows))}
    return sorted(rows, key=lambda row: order[row["slots"], row["policy"]])


def _change(row: dict[str, Any]) -> str:
    if row["misses_change"] is None:
        return ""
    edges = row["misses_change_ci95"]
    return f"{row['misses_change']:+.1%}" + (f" [{edges[0]:+.1%}, {edges[1]:+.1%}]" if edges else "")


def _layer_table(rows: Sequence[dict[str, Any]]) -> Table:
    several = len({row["trace"] for row in rows}) > 1
    table = Table(title="hit rate per layer, %", title_justify="left")
    table.add_column("layer", justify="right")
    for row in rows:
        name = f"\n{Path(row['trace']).stem}" if several else ""
        table.add_column(f"{row['policy']}\n{row['slots']}{name}", justify="right", no_wrap=True)
    for layer in range(max(len(row["layer_hit_rate"]) for row in rows)):
        rates = [row["layer_hit_rate"][layer] if layer < len(row["layer_hit_rate"]) else None for row in rows]
        table.add_row(str(layer), *("-" if rate is None else f"{rate * 100:.1f}" for rate in rates))
    return table
