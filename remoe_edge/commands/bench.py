"""`remoe-edge bench`: compare ways to hold the experts of a model."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.measure.bench import BASELINES, Options, Row, bench
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import default_threads
from remoe_edge.sizes import format_size, parse_size

_DEFAULT_PROMPT = "harbour.txt"
_TABLE_WIDTH = 160


@click.command("bench")
@click.argument(
    "models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
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
@click.option("--repack", is_flag=True, help="A second resident row, with the kernels that stock llama.cpp chooses.")
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Put each cache and mmap run, never a resident one, into a control group of this size (page cache included).",
)
@click.option("-p", "--prompt", metavar="TEXT", help="Text to go on from. [default: a packaged paragraph]")
@click.option("-n", "--n-gen", metavar="TOKENS", type=click.IntRange(min=2), default=64, show_default=True)
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@click.option("-r", "--repetitions", metavar="REPETITIONS", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the rows here (JSONL).")
@click.option("--force", is_flag=True, help="Overwrite an existing --output.")
@click.option("--policy", type=click.Choice(["lru", "lfu"]), help="Which expert loses its slot. [default: lfu]")
@click.option("--io", type=click.Choice(["auto", "direct", "mmap"]), help="How experts are read. [default: auto]")
@click.option("--cache-threads", metavar="N", type=click.IntRange(1, 64), help="Reader threads. [default: 4]")
@click.option("--json", "as_json", is_flag=True, help="Print the rows on stdout as one JSON array instead of JSONL.")
def command(
    models: tuple[Path, ...],
    budgets: tuple[str, ...],
    baselines: tuple[str, ...],
    repack: bool,
    memory_limit: str | None,
    prompt: str | None,
    n_gen: int,
    threads: int | None,
    repetitions: int,
    output: Path | None,
    force: bool,
    policy: str | None,
    io: str | None,
    cache_threads: int | None,
    as_json: bool,
) -> None:
    """Measure decoding: TPOT, reads, stalls and memory at each budget, beside stock llama.cpp.

    \b
    remoe-edge bench model.gguf --budget 16s --budget 880MiB --baseline mmap \\
        --baseline resident --memory-limit 1400MiB -n 64 -r 3 -o results.jsonl

    Each run is a fresh process that decodes greedily, with the page cache dropped before it where permitted; the arms
    take turns over the repetitions. One JSON row per arm goes to stdout, or to --output; a table goes to stderr. An arm
    that fails or is killed has a row that says why, and the others go on; the exit status is 1 if all failed.

    TPOT = (time of the last token - time of the first) / (tokens - 1). The limit is what physics leaves: the larger of
    the resident run's TPOT and the bytes that had to be read over the storage's bandwidth, measured on the same file.
    """
    for flag, given in ("--policy", policy), ("--io", io), ("--cache-threads", cache_threads):
        if given is not None and baselines and not budgets:
            raise click.UsageError(f"{flag} has no effect without --budget.")
    if force and output is None:
        raise click.UsageError("--force has no effect without --output.")
    if memory_limit is not None and not budgets and set(baselines) == {"resident"}:
        raise click.UsageError("--memory-limit has no effect on resident runs.")
    if output is not None:
        refuse_existing(output, force)
    options = Options(
        models=models,
        prompt=prompt if prompt is not None else packaged_prompt(_DEFAULT_PROMPT),
        n_gen=n_gen,
        n_threads=threads or default_threads(),
        budgets=budgets or (() if baselines or repack else ("auto",)),
        baselines=baselines,
        repack=repack,
        repetitions=repetitions,
        memory_limit=parse_size(memory_limit) if memory_limit else None,
        policy=policy,
        io=io,
        cache_threads=cache_threads,
    )
    with stderr_progress() as report:
        ensure_runtime(report=report)
        result = bench(options, report)
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    if output is not None:
        with atomic_output(output, force=force) as temporary:
            temporary.write_text(lines)
    if as_json:
        click.echo(json.dumps(result.rows))
    elif output is None:
        click.echo(lines, nl=False)
    print_table(result.rows, result.notes)
    if all(row["status"] != "ok" for row in result.rows):
        raise RemoeError(f"no run succeeded: {result.rows[0]['reason']}")


def packaged_prompt(name: str) -> str:
    """A prompt that comes with the package."""
    return (resources.files("remoe_edge") / "data" / "prompts" / name).read_text().strip()


def print_table(rows: list[Row], notes: list[str]) -> None:
    """The rows for people, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_TABLE_WIDTH)
    table = Table(caption="TPOT = (last - first token) / (n - 1), median over repetitions [95 % interval]")
    for name in ("model", "arm", "budget"):
        table.add_column(name, overflow="fold")
    for name in ("TPOT ms", "p95 ms", "TTFT ms", "hits", "MB/token", "stall ms", "peak memory", "x limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in rows:
        if row["reason"]:
            failed = " ".join(part for part in (Path(row["model_path"]).name, row["arm"], row["budget"]) if part)
            console.print(f"{failed} {row['status']}: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    arm = row["arm"] + (" (repacked)" if row["kernels"] == "repack" else "")
    budget = row["budget"] or ""
    if row["budget_bytes"] is not None:
        budget += f" ({format_size(row['budget_bytes'])})"
    name = Path(row["model_path"]).name
    if row["status"] != "ok":
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
        _text(row["limit_ratio"], ".2f"),
    ]


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)
