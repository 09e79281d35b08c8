"""Measure twins of several models at several budgets, beside stock llama.cpp: `make bench`.

Writes results.jsonl, results.md and tpot.png into a folder. Takes hours; interrupt it at any time and start it again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, cache_dir
from remoe_edge.measure.bench import Row
from remoe_edge.measure.matrix import TWINS, Settings, TwinSpec, measure_twin, prepare_twin
from remoe_edge.measure.matrix_report import markdown_table, write_plot
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import default_threads

_QUICK_LAYERS = 3


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-results"),
    show_default=True,
    help="Folder for results; one that an interrupted run left is gone on with.",
)
@click.option(
    "--traces",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with deepseek-v2-lite.npz and gpt-oss-20b.npz. Without it, OLMoE's packaged trace is the only one.",
)
@click.option(
    "--twin",
    "names",
    multiple=True,
    type=click.Choice([spec.name for spec in TWINS]),
    help="Measure this one only; repeatable. [default: all whose trace is there]",
)
@click.option(
    "--twins",
    "twin_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the twins, up to 6.5 GB each; they stay there. [default: in the cache folder]",
)
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="At most N layers: smaller, faster twins.")
@click.option("--policy", "policies", multiple=True, metavar="NAME", help="Repeatable. [default: next-use, lfu, lru]")
@click.option("--io", "read_modes", multiple=True, metavar="MODE", help="Repeatable. [default: direct, mmap]")
@click.option("--prefetch", "prefetches", multiple=True, metavar="HOW", help="Repeatable. [default: off, router]")
@click.option("-n", "--n-gen", type=click.IntRange(min=2), help="Tokens of a run. [default: 64]")
@click.option("--n-gen-mmap", type=click.IntRange(min=2), help="Tokens of a stock mmap run. [default: 16]")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), help="Rounds. [default: 3]")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]")
@click.option("--quick", is_flag=True, help=f"{_QUICK_LAYERS} layers, one round, one mode, few tokens: minutes.")
@click.option("--force", is_flag=True, help="Forget the runs that OUTPUT has of these twins.")
def main(
    output: Path,
    traces: Path | None,
    names: tuple[str, ...],
    twin_folder: Path | None,
    layers: int | None,
    policies: tuple[str, ...],
    read_modes: tuple[str, ...],
    prefetches: tuple[str, ...],
    n_gen: int | None,
    n_gen_mmap: int | None,
    repetitions: int | None,
    threads: int | None,
    quick: bool,
    force: bool,
) -> None:
    """Measure twins at C/E = 1/8, 1/4, 3/8, 1/2 and 1: stock mmap under the same memory limit, resident, and the cache.

    \b
    make bench ARGS="--traces ../traces --quick"
    python scripts/bench_matrix.py --traces ../traces -r 5 -o bench-results
    """
    defaults = Settings(n_threads=threads or default_threads())
    if quick:
        defaults = replace(
            defaults,
            policies=("next-use",),
            read_modes=("direct",),
            prefetches=("off",),
            n_gen=16,
            n_gen_mmap=4,
            repetitions=1,
        )
    settings = replace(
        defaults,
        policies=policies or defaults.policies,
        read_modes=read_modes or defaults.read_modes,
        prefetches=prefetches or defaults.prefetches,
        n_gen=n_gen or defaults.n_gen,
        n_gen_mmap=n_gen_mmap or defaults.n_gen_mmap,
        repetitions=repetitions or defaults.repetitions,
    )
    layers = layers or (_QUICK_LAYERS if quick else None)
    specs = [replace(spec, layers=min(spec.layers, layers or spec.layers)) for spec in choose_twins(names, traces)]
    with stderr_progress() as report:
        ensure_runtime(report=report)
        output.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        for spec in specs:
            model = prepare_twin(spec, traces, twin_folder or cache_dir() / "bench-matrix", report)
            journal = output / f"{spec.name}.runs.jsonl"
            if force:
                journal.unlink(missing_ok=True)
            rows += measure_twin(spec.name, model, settings, journal, report)
            # After each twin: what is there can be looked at while the next one runs.
            write_results(rows, output)
    click.echo(markdown_table(rows))
    click.echo(f"Wrote results.jsonl, results.md and tpot.png to {output}.", err=True)


def choose_twins(names: tuple[str, ...], traces: Path | None) -> list[TwinSpec]:
    """The twins to measure; one that was not named and has no trace is left out, which is said."""
    chosen = []
    for spec in TWINS:
        present = spec.trace is None or (traces is not None and (traces / spec.trace).exists())
        if spec.name in names or (not names and present):
            chosen.append(spec)
        elif not names:
            click.echo(f"Leaving out {spec.name}: no {spec.trace}; name its folder with --traces.", err=True)
    return chosen


def write_results(rows: list[Row], output: Path) -> None:
    with atomic_output(output / "results.jsonl", force=True) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with atomic_output(output / "results.md", force=True) as temporary:
        temporary.write_text(markdown_table(rows))
    with atomic_output(output / "tpot.png", force=True) as temporary:
        write_plot(rows, temporary)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; the same command goes on from here.", err=True)
        sys.exit(130)
    except RemoeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
