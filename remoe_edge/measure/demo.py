"""The main job on the model that comes with the package: base and tuned router under the expert cache, side by side.

1. The demo model as a GGUF, and its tuned router exported into it.
2. Both decode real text at small budgets: bytes per token, hits, and the output, equal for every budget.
3. Experts of the demo model are too small to keep a disk busy. So the routing of step 2 is recorded, and replayed by
   twins whose experts have the size of OLMoE's: there fewer bytes have to show up as time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.demo_model import demo_checkpoint, demo_gguf, demo_router, demo_tuning_text
from remoe_edge.errors import RemoeError
from remoe_edge.files import cache_dir
from remoe_edge.gguf_io.convert import convert
from remoe_edge.measure.arms import Options
from remoe_edge.measure.bench import Result, bench
from remoe_edge.measure.rows import Row
from remoe_edge.measure.workloads import Workload, load_workload, single_prompt
from remoe_edge.progress import Report, silent
from remoe_edge.routing.record import record_decode
from remoe_edge.routing.trace import Trace
from remoe_edge.routing.twin import plan_twin, write_twin
from remoe_edge.runtime.llama import CacheConfig, default_threads

WORKLOAD = "demo"
_BUDGETS = ("4s", "8s")
_N_GEN = 96
_TWIN_N_GEN = 160
_TWIN_REPETITIONS = 3
_MEMORY_LIMIT = 512 << 20
# Stock mmap reads most of the file for each token: few are enough, and more would take minutes.
_MMAP_N_GEN = 12


@dataclass(frozen=True)
class Demo:
    """Results of the real model, of the twins of its routing, and of stock mmap on the base's twin.

    `traces` are those of base and tuned, whose own output they record. `tuning` says what a router that was tuned here
    gained and cost on the text that was held out of its tuning.
    """

    models: tuple[Path, Path]
    real: Result
    twins: Result
    mmap: Result
    traces: tuple[Trace, Trace]
    memory_limit: int = _MEMORY_LIMIT
    tuning: str | None = None


def run_demo(report: Report = silent, *, tune: bool = False, folder: Path | None = None) -> Demo:
    """Make the models in the cache folder where they are missing, and measure them; minutes.

    With `tune` the router is tuned here, into `folder`, instead of taking the packaged one; that needs torch. Raises
    RemoeError if a run fails, or if what a model puts out depends on how its experts are held.
    """
    base = demo_gguf(report=report)
    tuning = None
    if tune:
        assert folder is not None
        router = folder / "tune" / "router.safetensors"
        tuning = tune_demo(router, report)
        tuned = folder / "demo-tuned.gguf"
        convert(base, router, tuned, force=True)
    else:
        tuned = demo_gguf(tuned=True)
    models = base, tuned
    workload = load_workload(WORKLOAD)
    real = bench(_options(models, workload, _N_GEN, baselines=("resident",)), report)
    check_identical(real.rows)
    traces = [
        record_decode(model, workload.prompts, _N_GEN - 1, CacheConfig("off"), report=report).trace for model in models
    ]
    twins = tuple(_twin(trace, name, report) for trace, name in zip(traces, ("base", "tuned"), strict=True))
    prompt = single_prompt("w00000")
    replayed = bench(_options(twins, prompt, _TWIN_N_GEN, limit=_MEMORY_LIMIT, repetitions=_TWIN_REPETITIONS), report)
    mmap = bench(_options(twins[:1], prompt, _MMAP_N_GEN, limit=_MEMORY_LIMIT, baselines=("mmap", "resident")), report)
    check_identical(mmap.rows)
    check_identical(replayed.rows)
    return Demo(models, real, replayed, mmap, (traces[0], traces[1]), tuning=tuning)


def _options(
    models: Sequence[Path],
    workload: Workload,
    n_gen: int,
    *,
    baselines: Sequence[str] = (),
    limit: int | None = None,
    repetitions: int = 1,
) -> Options:
    return Options(
        models=models,
        workload=workload,
        n_gen=n_gen,
        n_threads=default_threads(),
        budgets=_BUDGETS,
        baselines=baselines,
        memory_limit=limit,
        repetitions=repetitions,
    )


def tune_demo(output: Path, report: Report = silent) -> str:
    """Tune the demo model's router into `output`, as the packaged one was; what it gained and cost, in words.

    Raises RemoeError if torch is missing.
    """
    try:
        import torch

        from remoe_edge.evaluate.ablate import held_out_of, settings_of
        from remoe_edge.tuning.adapters import adapt
        from remoe_edge.tuning.data import load_sequences
        from remoe_edge.tuning.export import card, write_router
        from remoe_edge.tuning.load import load_model, load_tokenizer
        from remoe_edge.tuning.train import tune
    except ImportError as error:
        raise RemoeError(f"tuning needs {error.name}: pip install 'remoe-edge[tune]'") from error
    model = str(demo_checkpoint())
    config, length = settings_of(demo_router())
    rows = load_sequences([demo_tuning_text()], load_tokenizer(model), length, report=report)
    count = held_out_of(demo_router())
    train, held_out = rows.split(count)
    fast = None if torch.cuda.is_available() else torch.bfloat16
    result = tune(adapt(load_model(model)), train, held_out, config, folder=output.parent, autocast=fast, report=report)
    said = card(result, config, model="demo", data=rows.files, length=length, held_out=count)
    write_router(result.router, said, output, force=True)
    before, after = result.before, result.after
    reuse, ppl = after.reuse_rate / before.reuse_rate - 1, after.ppl / before.ppl - 1
    return (
        f"router tuned here, on {count} held-out sequences: reuse rate {before.reuse_rate:.1%} -> "
        f"{after.reuse_rate:.1%} ({reuse:+.1%}), perplexity {ppl:+.2%}"
    )


def _twin(trace: Trace, name: str, report: Report) -> Path:
    folder = cache_dir() / "demo" / f"twins-{trace.digest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-twin.gguf"
    if not path.exists():
        twin = plan_twin(trace, alignment=4096)
        write_twin(twin, path, progress=lambda written: report(f"writing {path.name}", written / twin.nbytes))
    return path


def check_identical(rows: Sequence[Row]) -> None:
    """Raise RemoeError unless every row succeeded, and those of one model agree in all tokens and all logits."""
    expected: dict[str, tuple[str, str]] = {}
    for row in rows:
        name = f"{Path(row['model_path']).name}, {row['arm']} {row['budget'] or ''}".rstrip()
        if row["status"] != "ok":
            raise RemoeError(f"{name}: {row['status']}: {row['reason']}")
        output = row["output_sha256"], row["logits_sha256"]
        if output != expected.setdefault(row["model_path"], output):
            raise RemoeError(f"{name}: its output differs from that of the model's other runs, which must not happen")


def summary(demo: Demo) -> list[str]:
    """What came out, in sentences."""
    lines = [demo.tuning] if demo.tuning else []
    for title, result in (("demo model", demo.real), ("twins with experts of OLMoE's size", demo.twins)):
        base, tuned = (_by_budget(result.rows, path) for path in _models(result.rows))
        for budget in base:
            old, new = base[budget], tuned[budget]
            text = (
                f"{title}, {budget[:-1]} slots per layer: {old['bytes_per_token'] / 1e6:.3g} -> "
                f"{new['bytes_per_token'] / 1e6:.3g} MB per token "
                f"({new['bytes_per_token'] / old['bytes_per_token'] - 1:+.1%}), hits {old['hit_rate']:.1%} -> "
                f"{new['hit_rate']:.1%}"
            )
            if result is demo.twins:
                times = old["tpot_ms"], new["tpot_ms"]
                text += f", TPOT {times[0]:.1f} -> {times[1]:.1f} ms ({times[1] / times[0] - 1:+.1%})"
            lines.append(text)
    rows = {row["arm"]: row for row in demo.mmap.rows if row["arm"] != "cache"}
    cached = [row for row in demo.mmap.rows if row["arm"] == "cache"][-1]
    lines.append(
        f"the base's twin in {demo.memory_limit >> 20} MiB: stock mmap {rows['mmap']['tpot_ms']:.0f} ms per token, "
        f"expert cache with {cached['budget'][:-1]} slots {cached['tpot_ms']:.1f} ms, all experts in memory "
        f"{rows['resident']['tpot_ms']:.1f} ms"
    )
    return lines


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model_path"] for row in rows))


def _by_budget(rows: Sequence[Row], model: str) -> dict[str, Row]:
    return {row["budget"]: row for row in rows if row["arm"] == "cache" and row["model_path"] == model}
