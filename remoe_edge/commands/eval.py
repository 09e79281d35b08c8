"""`remoe-edge eval`: hold tuned routers against the base they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from remoe_edge.demo_model import WORD, demo_checkpoint, demo_gguf, demo_router, demo_texts, demo_tuning_text
from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.as_gguf import base_gguf, is_gguf, tuned_gguf
from remoe_edge.evaluate.evaluation import CONTROL, TUNED, evaluate
from remoe_edge.evaluate.frontier import BIASES, frontier_markdown, in_words, measure_frontier, plan_frontier
from remoe_edge.evaluate.pictures import draw_ablation, draw_evaluation, draw_frontier
from remoe_edge.evaluate.reader import Reader
from remoe_edge.evaluate.report import markdown
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.progress import Report, stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import POLICIES

_DEMO_SEEDS = 3
_DEFAULT_LENGTH = 512


def _texts(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, Path]:
    """Of NAME=FILE, or of FILE with its stem as name."""
    texts: dict[str, Path] = {}
    for value in given:
        name, _, path = value.rpartition("=")
        name = name or Path(path).name.split(".")[0]
        if not Path(path).is_file():
            raise click.BadParameter(f"{path}: no such file", ctx, param)
        if name in texts or name == "all":
            raise click.BadParameter(f"there is a text '{name}' already; name this one: NAME={path}", ctx, param)
        texts[name] = Path(path)
    return texts


def _path(**more: Any) -> click.Path:
    return click.Path(path_type=Path, exists=True, **more)


@dataclass(frozen=True)
class _Options:
    """The command line. What is None or empty was not given."""

    base: Path
    tuned: tuple[Path, ...]
    demo: bool
    texts: dict[str, Path]
    controls: tuple[Path, ...]
    length: int | None
    sequences: int | None
    own_tokens: int | None
    expert_cache: str | None
    threads: int | None
    tasks: str | None
    task_folder: Path | None
    limit: int | None
    run_code: bool
    chat: bool
    ablate: bool
    data: tuple[Path, ...]
    seeds: int | None
    only: tuple[str, ...]
    frontier: bool
    slots: tuple[int, ...]
    biases: tuple[float, ...]
    policy: str | None
    quant: str | None
    output: Path | None
    force: bool
    as_json: bool

    def check(self) -> None:
        """Refuse what would have no effect, and what is missing."""
        for options, flag, wanted in (
            (("controls", "own_tokens", "tasks", "ablate"), "--frontier", not self.frontier),
            (("slots", "biases", "policy", "quant"), "--frontier", self.frontier),
            (("data", "seeds", "only"), "--ablate", self.ablate),
            (("task_folder", "limit", "run_code", "chat"), "--tasks", bool(self.tasks)),
        ):
            for option in options:
                if getattr(self, option) not in (None, (), False) and not wanted:
                    where = "with" if flag == "--frontier" and self.frontier else "without"
                    raise click.UsageError(f"{_FLAGS.get(option, '--' + option)} has no effect {where} {flag}.")
        if self.frontier and len(self.tuned) > 1:
            raise click.UsageError("--frontier compares BASE with one TUNED.")
        if (self.frontier or self.ablate) and self.output is None:
            raise click.UsageError(
                f"--{'frontier' if self.frontier else 'ablate'} needs --output: it keeps what is done."
            )
        if self.ablate and not self.data:
            raise click.UsageError("--ablate needs --data: the text to tune on.")
        if not self.texts:
            raise click.UsageError("Give held-out text with --text.")


_FLAGS = {
    "controls": "--control",
    "own_tokens": "--own-tokens",
    "task_folder": "--task-folder",
    "run_code": "--run-code",
    "slots": "--slots",
    "biases": "--bias",
}


@click.command("eval")
@click.argument("base", required=False)
@click.argument("tuned", type=_path(), nargs=-1)
@click.option("--demo", is_flag=True, help="The packaged demo model, its tuned routers and its held-out texts.")
@click.option(
    "--text", "texts", callback=_texts, metavar="[NAME=]FILE", multiple=True, help="Held-out text; repeatable."
)
@click.option("--control", "controls", type=_path(), multiple=True, help="CE-only router; repeatable.")
@click.option("--length", metavar="TOKENS", type=click.IntRange(2), help="Of a sequence. [default: as tuned, or 512]")
@click.option(
    "--sequences", metavar="N", type=click.IntRange(2), help="Most per text. [default: 32; with --frontier 2]"
)
@click.option("--own-tokens", metavar="N", type=click.IntRange(0), help="Of own greedy output. [default: 128]")
@click.option(
    "--expert-cache", metavar="SIZE", help="Of every GGUF, as in run. [default: off; --frontier: see --slots]"
)
@click.option("-t", "--threads", type=click.IntRange(1), help="Compute threads for GGUFs. [default: physical cores]")
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness, by comma (extra `eval`).")
@click.option("--task-folder", type=_path(file_okay=False), help="With task files (YAML) of your own.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Items of each task.")
@click.option("--run-code", is_flag=True, help="Run programs that the model writes, as humaneval wants.")
@click.option("--chat", is_flag=True, help="Put tasks into the model's chat template.")
@click.option("--ablate", is_flag=True, help="Tune again without each term of the loss, and on cross entropy alone.")
@click.option("--data", metavar="FILE", type=_path(dir_okay=False), multiple=True, help="To tune on; repeatable.")
@click.option("--seeds", metavar="N", type=click.IntRange(1), help="Of every variant. [default: 3]")
@click.option("--only", metavar="VARIANT", multiple=True, help="full, ce-only, no-kl ...; repeatable. [default: all]")
@click.option("--frontier", is_flag=True, help="Instead: perplexity against bytes per token, with a routing bias.")
@click.option("--slots", metavar="N", type=click.IntRange(1), multiple=True, help="[default: 1/8 and 1/4 of experts]")
@click.option(
    "--bias",
    "biases",
    metavar="LAMBDA",
    type=click.FloatRange(0),
    multiple=True,
    help=f"Routing bias; repeatable. [default: {', '.join(f'{bias:g}' for bias in BIASES)}]",
)
@click.option("--policy", type=click.Choice(POLICIES), help="Of the expert cache. [default: the runtime's]")
@click.option("--quant", metavar="TYPE", help="Of the GGUF that is made of a checkpoint folder, as in convert.")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="For .md, .json, .png."
)
@click.option("--force", is_flag=True, help="Overwrite an evaluation in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(base: str | None, tuned: tuple[Path, ...], demo: bool, texts: dict[str, Path], **given: Any) -> None:
    """Compare BASE with the routers TUNED; several TUNED are seeds of one setting.

    \b
    remoe-edge eval OLMoE-1B-7B router.safetensors --text wiki.txt --text code=held-out.py -o evaluation
    remoe-edge eval base.gguf tuned.gguf --text wiki.txt
    remoe-edge eval --demo

    BASE is a Hugging Face folder or a GGUF, TUNED a router (safetensors), a folder, or for a GGUF another one.

    Reuse, LRU misses, perplexity and KL on held-out text at 1, 2 and 4 times the length of training, for each text and
    all together, and on the model's own output; collapse checks; a noise floor; verdicts against the goals of ReMoE.

    With --ablate the settings of TUNED are tuned again with each term of the loss left out. With --frontier base and
    tuned decode with few experts in memory and a bias towards these: a picture of perplexity against bytes per token.
    Both keep what is done in --output, and go on from there.
    """
    if demo:
        if base:
            raise click.UsageError("BASE has no effect with --demo.")
        base, tuned = WORD, tuple(demo_router(seed) for seed in range(1 if given["frontier"] else _DEMO_SEEDS))
        texts = texts or demo_texts()
        if given["ablate"]:
            given["data"] = given["data"] or (demo_tuning_text(),)
    if base is None or not tuned:
        raise click.UsageError("Give BASE and at least one TUNED, or --demo.")
    demo = base == WORD and not Path(base).exists()
    chosen = demo_checkpoint() if demo else Path(base)
    if not chosen.exists():
        raise click.UsageError(f"BASE: {base}: no such file or folder.")
    options = _Options(base=chosen, tuned=tuned, demo=demo, texts=texts, **given)
    options.check()
    if options.output is not None:
        outputs = ("frontier.md", "frontier.png") if options.frontier else ("eval.json", "eval.md", "eval.png")
        for name in outputs:
            refuse_existing(options.output / name, options.force)
        options.output.mkdir(parents=True, exist_ok=True)
    title = f"{'Demo model' if demo else chosen.stem if chosen.is_file() else chosen.name}: base against tuned router"
    with stderr_progress() as report:
        if options.frontier:
            result, text = _frontier(options, title, report)
        else:
            result, text = _evaluate(options, title, report)
    click.echo(json.dumps(result) if options.as_json else text)


def _evaluate(options: _Options, title: str, report: Report) -> tuple[dict[str, Any], str]:
    with (_ggufs if is_gguf(options.base) else _checkpoint)(options, report) as (reader, groups, length, tasks):
        result = evaluate(
            reader,
            options.texts,
            groups=groups,
            length=options.length or length or _DEFAULT_LENGTH,
            sequences=options.sequences or 32,
            own_tokens=128 if options.own_tokens is None else options.own_tokens,
            report=report,
        )
        if options.tasks:
            result["tasks"] = tasks(options.tasks.split(","))
    text = markdown(result, title)
    if options.output is not None:
        with atomic_output(options.output / "eval.json", force=True) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        with atomic_output(options.output / "eval.png", force=True) as temporary:
            draw_evaluation(result, temporary, title)
        if options.ablate:
            with atomic_output(options.output / "ablation.png", force=True) as temporary:
                draw_ablation(result, temporary, title)
        with atomic_output(options.output / "eval.md", force=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return result, text


_Side = tuple[Reader, Mapping[str, Sequence[str]], int | None, Callable[[list[str]], list[dict[str, Any]]]]
"""What reads, its routers by setting, the length they were tuned with, and what runs tasks."""


@contextmanager
def _ggufs(options: _Options, report: Report) -> Iterator[_Side]:
    if options.ablate or options.tasks:
        flag = "--ablate" if options.ablate else "--tasks"
        raise click.UsageError(f"{flag} needs BASE to be a Hugging Face folder.")
    ensure_runtime(report=report)
    from remoe_edge.evaluate.gguf_reader import open_ggufs

    with TemporaryDirectory(prefix="remoe-edge-", dir=options.output) as folder:
        made = {
            path: tuned_gguf(options.base, path, Path(folder), report=report)
            for path in (*options.tuned, *options.controls)
        }
        names = _names(options)
        paths = {"base": options.base} | {name: made[path] for name, path in names.items()}
        with open_ggufs(paths, expert_cache=options.expert_cache or "off", threads=options.threads) as reader:
            yield reader, _groups(names, options), None, lambda _tasks: []


@contextmanager
def _checkpoint(options: _Options, report: Report) -> Iterator[_Side]:
    for flag, value in ("--expert-cache", options.expert_cache), ("--threads", options.threads):
        if value is not None:
            raise click.UsageError(f"{flag} has no effect on a Hugging Face folder.")
    if not options.base.is_dir():
        raise RemoeError(f"{options.base}: is neither a GGUF nor the folder of a Hugging Face checkpoint")
    try:
        import torch

        from remoe_edge.evaluate.ablate import FULL, ablate, held_out_of, settings_of
        from remoe_edge.evaluate.harness import run_tasks
        from remoe_edge.evaluate.hf_reader import HfReader, router_from, router_state, set_router
        from remoe_edge.tuning.adapters import adapt
        from remoe_edge.tuning.data import load_sequences
        from remoe_edge.tuning.load import load_model, load_tokenizer
    except ImportError as error:
        raise RemoeError(f"evaluating a checkpoint needs {error.name}: pip install 'remoe-edge[tune]'") from error
    tokenizer = load_tokenizer(str(options.base))
    report("loading the model", None)
    moe = adapt(load_model(str(options.base)).eval())
    base = router_state(moe)
    names = _names(options)
    groups = _groups(names, options)
    if options.ablate:
        config, tuned_length = settings_of(options.tuned[0])
        rows = load_sequences(options.data, tokenizer, tuned_length, report=report)
        train, held_out = rows.split(held_out_of(options.tuned[0]))
        made = ablate(
            moe,
            base,
            config,
            train,
            held_out,
            folder=options.output or Path(),
            model=str(options.base),
            seeds=options.seeds or 3,
            only=options.only,
            autocast=None if torch.cuda.is_available() else torch.bfloat16,
            report=report,
        )
        for variant, paths in made.items():
            own = {f"{variant}-seed{seed}": path for seed, path in enumerate(paths)}
            names |= own
            # What was tuned here, all in one way, takes the place of what was given.
            groups[TUNED if variant == FULL else variant] = list(own)
    routers = {"base": base} | {name: router_from(moe, path) for name, path in names.items()}
    used = {"base", *(name for group in groups.values() for name in group)}
    for parameter in moe.model.parameters():
        parameter.requires_grad_(False)
    moe.model.eval()
    reader = HfReader(moe, tokenizer, {name: router for name, router in routers.items() if name in used})

    def tasks(wanted: list[str]) -> list[dict[str, Any]]:
        return run_tasks(
            reader,
            tokenizer,
            wanted,
            names=["base", *groups[TUNED], *groups.get(CONTROL, ())],
            limit=options.limit,
            folder=options.task_folder,
            run_code=options.run_code,
            chat=options.chat,
            report=report,
        )

    yield reader, groups, _length_of(options.tuned[0], settings_of), tasks
    set_router(moe, base)


def _frontier(options: _Options, title: str, report: Report) -> tuple[dict[str, Any], str]:
    assert options.output is not None
    if options.expert_cache is not None:
        raise click.UsageError("--expert-cache has no effect with --frontier; use --slots.")
    ensure_runtime(report=report)
    if options.demo and options.quant is None:
        base = demo_gguf(report=report)
    elif is_gguf(options.base) and options.quant:
        raise click.UsageError("--quant has no effect on a GGUF.")
    else:
        base = base_gguf(options.base, options.output, quant=options.quant, report=report)
    plan = plan_frontier(
        base,
        tuned_gguf(base, options.tuned[0], options.output, report=report),
        options.texts,
        slots=options.slots,
        biases=options.biases or BIASES,
        length=options.length or _DEFAULT_LENGTH,
        sequences=options.sequences or 2,
        policy=options.policy,
        threads=options.threads,
        report=report,
    )
    points = measure_frontier(plan, options.output / "frontier.jsonl", force=options.force, report=report)
    text = frontier_markdown(points, title)
    with atomic_output(options.output / "frontier.png", force=True) as temporary:
        draw_frontier(points, temporary, title)
    with atomic_output(options.output / "frontier.md", force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {"points": points, "summary": in_words(points)}, text


def _names(options: _Options) -> dict[str, Path]:
    """A name for every router given, told apart where files in different folders have the same."""
    names: dict[str, Path] = {}
    given = [("", path) for path in options.tuned] + [("control ", path) for path in options.controls]
    for prefix, path in given:
        stem = prefix + (path.stem if path.is_file() else path.name)
        name = stem if stem not in names and stem != "base" else f"{prefix}{path.resolve().parent.name}/{path.name}"
        if name in names:
            raise click.UsageError(f"{path} is given twice.")
        names[name] = path
    return names


def _groups(names: Mapping[str, Path], options: _Options) -> dict[str, list[str]]:
    ordered = list(names)
    groups = {TUNED: ordered[: len(options.tuned)]}
    if options.controls:
        groups[CONTROL] = ordered[len(options.tuned) :]
    return groups


def _length_of(router: Path, settings_of: Callable[[Path], tuple[Any, int]]) -> int | None:
    """Of the sequences that it was tuned with, where its card says."""
    try:
        return settings_of(router)[1]
    except RemoeError:
        return None
