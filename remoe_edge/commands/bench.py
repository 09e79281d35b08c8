"""`remoe-edge bench`: compare ways to hold the experts of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.measure.arms import BASELINES, PAGE_CACHES, Options
from remoe_edge.measure.bench import bench
from remoe_edge.measure.journal import journal_path, refuse_interrupted
from remoe_edge.measure.rows import TPOT_FORMULA, Row
from remoe_edge.measure.workloads import PACKAGED, Workload, load_workload, single_prompt
from remoe_edge.parameters import cache_threads_option, gpu_layers_option, model_path, verify_option
from remoe_edge.power.find import SOURCES
from remoe_edge.progress import stderr_progress
from remoe_edge.report.labels import arm_name
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import (
    DEFAULT_ROUTE_KEEP,
    MAX_ROUTE_BIAS,
    POLICIES,
    PREFETCHES,
    READ_MODES,
    default_threads,
)
from remoe_edge.sizes import format_size, parse_size

_DEFAULT_PROMPT = "harbour.txt"
_TABLE_WIDTH = 160


@click.command("bench")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=model_path)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="SIZE",
    help="Expert cache budget: bytes (880MiB), slots per layer (16s) or auto; may be repeated. "
    "[default: auto, unless there is a --baseline]",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(BASELINES),
    help="Measure as well: stock llama.cpp with experts in the page cache (mmap), or all experts in memory (resident).",
)
@click.option("--repack", is_flag=True, help="Use this CPU's repacked kernels in cache and resident runs.")
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Put each cache and mmap run, never a resident one, into a control group of this size (page cache included).",
)
@click.option("-p", "--prompt", metavar="TEXT", help="Text to go on from. [default: a packaged paragraph]")
@click.option(
    "--workload",
    metavar="NAME|FILE",
    help=f"Prompts instead of -p: {', '.join(PACKAGED)}, or a JSONL file (also ShareGPT's format). Questions are put "
    "into the model's chat template where it has one.",
)
@click.option("--prompts", metavar="N", type=click.IntRange(min=1), help="Use the first N prompts of --workload.")
@click.option("-n", "--n-gen", metavar="TOKENS", type=click.IntRange(min=2), default=64, show_default=True)
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@gpu_layers_option
@click.option("-r", "--repetitions", metavar="REPETITIONS", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the rows here (JSONL).")
@click.option("--force", is_flag=True, help="Overwrite an existing --output.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted benchmark that was to write --output.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    help=f"Which experts keep their slots; may be repeated. [default: {POLICIES[0]}]",
)
@click.option(
    "--io",
    "read_modes",
    multiple=True,
    type=click.Choice(READ_MODES),
    help="How experts are read; may be repeated. [default: auto]",
)
@click.option(
    "--prefetch",
    "prefetches",
    multiple=True,
    type=click.Choice(PREFETCHES),
    help="Read ahead what the next layer's router would choose now: always (router), or in layers where most of it is "
    "needed (auto); may be repeated. [default: off]",
)
@click.option(
    "--route-bias",
    "route_biases",
    metavar="LAMBDA",
    multiple=True,
    type=click.FloatRange(0, MAX_ROUTE_BIAS, min_open=True),
    help="LOSSY, and measured beside the model's own routing: prefer experts in the cache by LAMBDA times the mean "
    "range of the router's logits (arXiv 2412.00099); may be repeated.",
)
@click.option(
    "--route-keep",
    metavar="N",
    type=click.IntRange(min=0),
    help=f"With --route-bias the router's own first N choices stay. [default: {DEFAULT_ROUTE_KEEP}]",
)
@cache_threads_option
@verify_option
@click.option(
    "--expert-cache-warm",
    "warm",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Hot set (as `run --expert-cache-warm` writes it) that every cache run starts from; it stays as it is.",
)
@click.option(
    "--page-cache",
    type=click.Choice(PAGE_CACHES),
    default="cold",
    show_default=True,
    help="Before each run: dropped where permitted, or filled by reading the model through.",
)
@click.option(
    "--power",
    metavar="SENSOR",
    type=click.Choice(["auto", *SOURCES]),
    default="auto",
    show_default=True,
    help=f"Power sensor: auto, {', '.join(SOURCES)}.",
)
@click.option(
    "--cool-down",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    help="Before each run, wait at most so long for the temperature that the chip had before the first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows on stdout as one JSON array instead of JSONL.")
def command(
    models: tuple[Path, ...],
    budgets: tuple[str, ...],
    baselines: tuple[str, ...],
    repack: bool,
    memory_limit: str | None,
    prompt: str | None,
    workload: str | None,
    prompts: int | None,
    n_gen: int,
    threads: int | None,
    gpu_layers: int | str,
    repetitions: int,
    output: Path | None,
    force: bool,
    resume: bool,
    policies: tuple[str, ...],
    read_modes: tuple[str, ...],
    prefetches: tuple[str, ...],
    route_biases: tuple[float, ...],
    route_keep: int | None,
    cache_threads: int | str | None,
    verify: bool | None,
    warm: Path | None,
    page_cache: str,
    power: str,
    cool_down: float,
    as_json: bool,
) -> None:
    """Measure decoding: TPOT, reads, stalls and memory at each budget, beside stock llama.cpp.

    \b
    remoe-edge bench model.gguf --budget 16s --budget 880MiB --baseline mmap \\
        --baseline resident --memory-limit 1400MiB --workload gsm8k -r 5 -o results.jsonl
    remoe-edge report results.jsonl -o report.html

    Each run is a fresh process that decodes one prompt greedily, -n tokens whatever the model says; the arms take turns
    over prompts and repetitions (ABBA). One JSON row per arm goes to stdout, or to --output; a table goes to stderr. An
    arm that fails or is killed has a row that says why, and the others go on; the exit status is 1 if all failed.

    With --output, runs are kept in OUTPUT.partial until all are made: after Ctrl-C or a crash, the same command with
    --resume goes on.

    TPOT = (time of the last token - time of the first) / (tokens - 1); of several prompts their mean; then the median
    over repetitions. The limit is what physics leaves: the larger of the resident run's TPOT and the bytes that had to
    be read over the storage's bandwidth, measured on the same file.
    """
    of_cache = {
        "--policy": policies,
        "--io": read_modes,
        "--prefetch": prefetches,
        "--route-bias": route_biases,
        "--cache-threads": cache_threads,
        "--expert-cache-verify": verify,
        "--expert-cache-warm": warm,
    }
    for flag, given in of_cache.items():
        if given and baselines and not budgets:
            raise click.UsageError(f"{flag} has no effect without --budget.")
    check_route_bias(route_biases, route_keep, prefetches)
    for flag, on in ("--force", force), ("--resume", resume):
        if on and output is None:
            raise click.UsageError(f"{flag} has no effect without --output.")
    if force and resume:
        raise click.UsageError("--resume goes on and --force starts again; give one of them.")
    if memory_limit is not None and not budgets and set(baselines) == {"resident"}:
        raise click.UsageError("--memory-limit has no effect on resident runs.")
    if output is not None:
        refuse_interrupted(output, resume=resume, force=force)
        # An output beside the runs is an older one that was to be overwritten, or the same runs written a moment before
        # a crash.
        force = force or resume
        refuse_existing(output, force)
    options = Options(
        models=models,
        workload=_workload(workload, prompts, prompt),
        n_gen=n_gen,
        n_threads=threads or default_threads(),
        budgets=budgets or (() if baselines else ("auto",)),
        baselines=baselines,
        repack=repack,
        repetitions=repetitions,
        memory_limit=parse_size(memory_limit) if memory_limit else None,
        policies=policies or (None,),
        read_modes=read_modes or (None,),
        prefetches=prefetches or (None,),
        route_biases=(None, *route_biases),
        route_keep=route_keep,
        cache_threads=cache_threads,
        verify_reads=bool(verify),
        warm=warm,
        page_cache=page_cache,
        power=power,
        cool_down_s=cool_down,
        gpu_layers=gpu_layers,
    )
    journal = journal_path(output) if output else None
    try:
        with stderr_progress() as report:
            ensure_runtime(report=report)
            result = bench(options, report, journal=journal, resume=resume)
    except (KeyboardInterrupt, SystemExit):
        if journal and journal.exists():
            click.echo(
                f"Interrupted; the runs so far are in {journal}: go on with the same command and --resume", err=True
            )
        raise
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    if output is not None:
        with atomic_output(output, force=force) as temporary:
            temporary.write_text(lines)
        journal_path(output).unlink()
    if as_json:
        click.echo(json.dumps(result.rows))
    elif output is None:
        click.echo(lines, nl=False)
    print_table(result.rows, result.notes)
    if all(row["status"] not in ("ok", "invalid") for row in result.rows):
        raise RemoeError(f"no run succeeded: {result.rows[0]['reason']}")


def check_route_bias(biases: Sequence[float], keep: int | None, prefetches: Sequence[str]) -> None:
    """Refuse, before a model is loaded, what the runtime would refuse or what would have no effect."""
    if keep is not None and not biases:
        raise click.UsageError("--route-keep has no effect without --route-bias.")
    if biases and set(prefetches) - {"off"}:
        raise click.UsageError(
            "--route-bias and --prefetch exclude each other: output would depend on how fast is read ahead."
        )


def _workload(name: str | None, prompts: int | None, text: str | None) -> Workload:
    if name is not None:
        if text is not None:
            raise click.UsageError("-p and --workload exclude each other.")
        return load_workload(name, prompts)
    if prompts is not None:
        raise click.UsageError("--prompts has no effect without --workload.")
    if text is not None:
        return single_prompt(text)
    return single_prompt(packaged_prompt(_DEFAULT_PROMPT), Path(_DEFAULT_PROMPT).stem)


def packaged_prompt(name: str) -> str:
    """A prompt that comes with the package."""
    return (resources.files("remoe_edge") / "data" / "prompts" / name).read_text().strip()


def print_table(rows: list[Row], notes: list[str]) -> None:
    """The rows for people, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_TABLE_WIDTH)
    table = Table(caption=f"{TPOT_FORMULA}, median over repetitions [95 % interval]")
    for name in ("model", "arm", "budget"):
        table.add_column(name, overflow="fold")
    for name in ("TPOT ms", "p95 ms", "TTFT ms", "hits", "MB/token", "stall ms", "peak memory", "J/token", "x limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, rows))
    console.print(table)
    for row in rows:
        if row["reason"]:
            failed = " ".join(part for part in (Path(row["model_path"]).name, row["arm"], row["budget"]) if part)
            console.print(f"{failed} {row['status']}: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _cells(row: Row, rows: list[Row]) -> list[str]:
    arm = arm_name(row, rows)
    budget = row["budget"] or ""
    if row["budget_bytes"] is not None:
        budget += f" ({format_size(row['budget_bytes'])})"
    name = Path(row["model_path"]).name
    if row["tpot_ms"] is None:
        return [name, arm, budget, row["status"]]
    interval = row["tpot_ms_ci95"]
    return [
        name,
        arm,
        budget,
        _text(row["tpot_ms"], ".1f") + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""),
        _text(row["itl_ms_p95"], ".1f"),
        _text(row["ttft_ms"], ".0f"),
        _text(row["hit_rate"], ".1%"),
        _text(row["bytes_per_token"], ".1f", 1e-6),
        _text(row["stall_ms_per_token"], ".1f"),
        format_size(row["peak_memory_bytes"]),
        _text(row["joules_per_token"], ".3g"),
        _text(row["limit_ratio"], ".2f"),
    ]


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)
