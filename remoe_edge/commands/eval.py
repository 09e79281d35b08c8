"""`remoe-edge eval`: hold tuned routers against the base they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from remoe_edge.demo_model import WORD, demo_checkpoint, demo_router, demo_texts
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.progress import stderr_progress


class _Text(click.ParamType[Any]):
    """NAME=FILE, or FILE with its stem as name."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, _, path = value.rpartition("=")
        if not Path(path).is_file():
            self.fail(f"{path}: no such file", param, ctx)
        return name or Path(path).stem, Path(path)


@click.command("eval")
@click.argument("base", required=False)
@click.argument("tuned", type=click.Path(path_type=Path, exists=True), nargs=-1)
@click.option("--demo", is_flag=True, help="The packaged demo model, its tuned routers and its held-out texts.")
@click.option("--text", "texts", type=_Text(), metavar="[NAME=]FILE", multiple=True, help="Held-out text; repeatable.")
@click.option(
    "--control",
    "controls",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="CE-only router; repeatable.",
)
@click.option(
    "--length", metavar="TOKENS", type=click.IntRange(min=2), help="Of a sequence. [default: as tuned, or 512]"
)
@click.option(
    "--sequences", metavar="N", type=click.IntRange(min=2), default=32, show_default=True, help="Most per text."
)
@click.option(
    "--own-tokens", metavar="N", type=click.IntRange(min=0), default=128, show_default=True, help="Of own output."
)
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness, by comma (extra `eval`).")
@click.option("--limit", type=click.IntRange(min=1), help="Items of each task.")
@click.option("--ablate", is_flag=True, help="Tune again without each term of the loss, and on cross entropy alone.")
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Text to tune on with --ablate; repeatable.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Of every variant with --ablate."
)
@click.option(
    "--only", metavar="VARIANT", multiple=True, help="Of the variants of --ablate; repeatable. [default: all]"
)
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="For eval.md, .json, .png."
)
@click.option("--force", is_flag=True, help="Overwrite an evaluation in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    base: str | None,
    tuned: tuple[Path, ...],
    demo: bool,
    texts: tuple[tuple[str, Path], ...],
    controls: tuple[Path, ...],
    length: int | None,
    sequences: int,
    own_tokens: int,
    tasks: str | None,
    limit: int | None,
    ablate: bool,
    data: tuple[Path, ...],
    seeds: int,
    only: tuple[str, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare BASE, a Hugging Face folder, with the routers TUNED (safetensors): several are seeds of one setting.

    \b
    remoe-edge eval OLMoE-1B-7B router.safetensors --text wiki.txt --text code=held-out.py -o evaluation
    remoe-edge eval --demo

    Reuse, LRU misses, perplexity and KL on held-out text at 1, 2 and 4 times the length of training, on every text
    alone and together, and on the model's own output; collapse checks; verdicts against the goals of ReMoE. With
    --ablate the settings of TUNED are run again without each term of the loss: --output keeps what is done.
    """
    if demo:
        if base:
            raise click.UsageError("BASE has no effect with --demo.")
        base, tuned = WORD, tuple(demo_router(seed) for seed in range(3))
        texts = texts or tuple(demo_texts().items())
    if base is None or not tuned:
        raise click.UsageError("Give BASE and at least one TUNED, or --demo.")
    if not texts:
        raise click.UsageError("Give held-out text with --text.")
    for given, flag, needed in ((data, "--data", ablate), (only, "--only", ablate), (limit, "--limit", tasks)):
        if given and not needed:
            raise click.UsageError(f"{flag} has no effect without {'--tasks' if flag == '--limit' else '--ablate'}.")
    if ablate and (output is None or not data):
        raise click.UsageError("--ablate needs --data and --output.")
    if output is not None:
        for name in "eval.json", "eval.md", "eval.png":
            refuse_existing(output / name, force)
        output.mkdir(parents=True, exist_ok=True)
    try:
        import torch

        from remoe_edge.evaluate.ablate import ablate as run_ablations
        from remoe_edge.evaluate.ablate import groups, settings_of
        from remoe_edge.evaluate.evaluation import evaluate
        from remoe_edge.evaluate.harness import run_tasks
        from remoe_edge.evaluate.passes import router_state
        from remoe_edge.evaluate.report import draw, markdown
        from remoe_edge.tuning.adapters import adapt
        from remoe_edge.tuning.data import load_sequences
        from remoe_edge.tuning.export import apply_router
        from remoe_edge.tuning.load import load_model, load_tokenizer
    except ImportError as error:
        raise RemoeError(f"evaluating needs {error.name}: pip install 'remoe-edge[tune]'") from error
    model = str(demo_checkpoint()) if base == WORD else base
    with stderr_progress() as report:
        tokenizer = load_tokenizer(model)
        moe = adapt(load_model(model).eval())
        for parameter in moe.model.parameters():
            parameter.requires_grad_(False)
        base_router = router_state(moe)

        def read(path: Path) -> Mapping[str, torch.Tensor]:
            apply_router(moe, path)
            return router_state(moe)

        routers = {_name(path): read(path) for path in tuned}
        control = {f"ce-only {_name(path)}": read(path) for path in controls}
        others: Mapping[str, Mapping[str, torch.Tensor]] = {}
        if ablate:
            assert output is not None
            config, tuned_length = settings_of(tuned[0])
            rows = load_sequences(data, tokenizer, tuned_length, report=report)
            kept = len(rows) // 20 + 1 if len(rows) < 640 else 32
            fast = torch.bfloat16 if not torch.cuda.is_available() else None
            made = run_ablations(
                moe,
                base_router,
                config,
                rows.part(slice(0, -kept)),
                rows.part(slice(-kept, None)),
                folder=output,
                model=model,
                seeds=seeds,
                only=only,
                autocast=fast,
                report=report,
            )
            full, control_made, rest = groups(made)
            routers = full or routers
            control |= control_made
            others = rest
        if length is None:
            try:
                length = settings_of(tuned[0])[1]
            except RemoeError:
                length = 512
        result = evaluate(
            moe,
            tokenizer,
            routers,
            dict(texts),
            base=base_router,
            controls=control,
            others=others,
            length=length,
            sequences=sequences,
            own_tokens=own_tokens,
            report=report,
        )
        if tasks:
            everyone = {"base": base_router, **routers}
            result["tasks"] = run_tasks(moe, tokenizer, everyone, tasks.split(","), limit=limit)
    title = f"{Path(model).name if base != WORD else 'Demo model'}: base against tuned router"
    text = markdown(result, title)
    if output is not None:
        with atomic_output(output / "eval.json", force=True) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        with atomic_output(output / "eval.md", force=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        with atomic_output(output / "eval.png", force=True) as temporary:
            draw(result, temporary, title)
    click.echo(json.dumps(result) if as_json else text)


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.name
