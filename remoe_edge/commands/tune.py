"""`remoe-edge tune`: fine-tune a model's routers so that neighbouring tokens reuse experts."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import refuse_existing
from remoe_edge.progress import silent, stderr_progress
from remoe_edge.sizes import format_size
from remoe_edge.tuning.weights import Weights

_TERMS = ("kl", "reuse", "smooth", "lag", "window")
_DEFAULT = Weights()


@click.command("tune")
@click.argument("model")
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    required=True,
    help="Text, JSON Lines or JSON, also .gz; repeatable.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    required=True,
    help="The tuned router, .safetensors.",
)
@click.option(
    "--export-hf", metavar="DIR", type=click.Path(path_type=Path), help="Write a whole checkpoint with it, too."
)
@click.option(
    "--held-out-data",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Text for the guards; repeatable. [default: sequences from all over --data]",
)
@click.option(
    "--held-out", metavar="N", type=click.IntRange(min=1), default=32, show_default=True, help="Its sequences."
)
@click.option(
    "--length", metavar="TOKENS", type=click.IntRange(min=2), default=2048, show_default=True, help="Of a sequence."
)
@click.option(
    "--export-router-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the router in --export-hf; that of OUTPUT is float32. [default: as in MODEL]",
)
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--lr", "learning_rate", type=click.FloatRange(min=0, min_open=True), default=5e-5, show_default=True)
@click.option(
    "--warm-up", metavar="STEPS", type=click.IntRange(min=0), default=200, show_default=True, help="Of the rate."
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="constant",
    show_default=True,
    help="The rate after its warm-up.",
)
@click.option(
    "--local-warm-up",
    metavar="STEPS",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Steps in which the weight of the locality losses rises to 1.",
)
@click.option(
    "--micro-batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once."
)
@click.option(
    "--accumulation", metavar="N", type=click.IntRange(min=1), default=8, show_default=True, help="Of them per step."
)
@click.option(
    "--clip", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Gradient norm."
)
@click.option("--ce", type=click.FloatRange(min=0), help=f"Weight of the cross entropy. [default: {_DEFAULT.ce:g}]")
@click.option(
    "--kl", type=click.FloatRange(min=0), help=f"Weight of KL(P || reference router). [default: {_DEFAULT.kl:g}]"
)
@click.option("--reuse", type=click.FloatRange(min=0), help=f"Weight of the reuse loss. [default: {_DEFAULT.reuse:g}]")
@click.option(
    "--smooth",
    type=click.FloatRange(min=0),
    help=f"Weight of the loss between neighbours. [default: {_DEFAULT.smooth:g}]",
)
@click.option(
    "--lag",
    type=click.FloatRange(min=0),
    help=f"Weight of the loss over lags 1, 2, 4, 8, 16. [default: {_DEFAULT.lag:g}]",
)
@click.option(
    "--window", type=click.FloatRange(min=0), help=f"Weight of the entropy of windows. [default: {_DEFAULT.window:g}]"
)
@click.option("--window-size", metavar="TOKENS", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--control", type=click.Choice(["ce-only"]), help="Train on cross entropy alone, for comparison.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order of the data.")
@click.option("--check-every", metavar="STEPS", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--max-ppl-increase",
    metavar="PART",
    type=float,
    default=0.01,
    show_default=True,
    help="Keep the state that reuses most among those whose held-out perplexity rises by no more; negative: no guard.",
)
@click.option("--max-kl", metavar="NATS", type=float, help="The same for KL(base || tuned) of the next token.")
@click.option("--responses-only", is_flag=True, help="Cross entropy on answers only (dialogues and pairs).")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, a third more time.")
@click.option(
    "--experts-on-cpu",
    is_flag=True,
    help="Keep experts in host memory, for a small GPU; includes --gradient-checkpointing.",
)
@click.option(
    "--work", metavar="DIR", type=click.Path(path_type=Path), help="Checkpoint and log. [default: OUTPUT.work]"
)
@click.option("--force", is_flag=True, help="Overwrite an existing --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as one JSON object.")
def command(
    model: str,
    data: tuple[Path, ...],
    output: Path,
    export_hf: Path | None,
    export_router_dtype: str | None,
    held_out_data: tuple[Path, ...],
    held_out: int,
    length: int,
    window_size: int,
    control: str | None,
    max_ppl_increase: float,
    responses_only: bool,
    dtype: str,
    gradient_checkpointing: bool,
    experts_on_cpu: bool,
    work: Path | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Tune the routers of MODEL, a Hugging Face folder or hub id; everything else stays as it is.

    \b
    remoe-edge tune allenai/OLMoE-1B-7B-0924 --data chats.jsonl -o router.safetensors

    Losses and settings are those of ReMoE (arXiv 2605.27081); docs/tuning.md explains them. Several GPUs or machines:
    torchrun --nproc-per-node 4 -m remoe_edge tune ... After Ctrl-C or a crash the same command goes on where it was.

    Beside OUTPUT lies its card as Markdown: settings, hashes, figures before and after.
    """
    weights = {name: settings.pop(name) for name in ("ce", *_TERMS)}
    given = {name: value for name, value in weights.items() if value is not None}
    if control and given:
        raise click.UsageError(f"--{next(iter(given))} has no effect with --control {control}.")
    if export_router_dtype and export_hf is None:
        raise click.UsageError("--export-router-dtype has no effect without --export-hf.")
    refuse_existing(output, force)
    if not output.resolve().parent.is_dir():
        raise RemoeError(f"{output.resolve().parent} is not a folder; create it first")
    work = work or output.with_name(output.name + ".work")
    if export_hf is not None and not Path(model).is_dir():
        raise RemoeError("--export-hf needs MODEL to be a folder; download it first: hf download MODEL --local-dir DIR")
    try:
        import torch

        from remoe_edge.tuning.adapters import adapt
        from remoe_edge.tuning.data import load_sequences
        from remoe_edge.tuning.estimate import estimate
        from remoe_edge.tuning.export import CARD, card, export_checkpoint, write_card, write_router
        from remoe_edge.tuning.load import DTYPES, load_model, load_tokenizer
        from remoe_edge.tuning.train import TuneConfig, join_processes, tune
    except ImportError as error:
        raise RemoeError(f"tuning needs {error.name}: pip install 'remoe-edge[tune]'") from error
    # A run that was killed when all but the router was written goes on.
    if export_hf is not None and export_hf.exists() and not (work.is_dir() and (export_hf / CARD).is_file()):
        raise RemoeError(f"{export_hf} exists; choose another folder for --export-hf")
    chosen = Weights(**dict.fromkeys(_TERMS, 0.0)) if control else Weights(**given)
    guard = max_ppl_increase if max_ppl_increase >= 0 else None
    config = TuneConfig(weights=chosen, window=window_size, max_ppl_increase=guard, **settings)
    assert {field.name for field in fields(TuneConfig)} >= settings.keys()
    accelerator = join_processes()
    # One process speaks for all.
    with stderr_progress() if accelerator.is_main_process else nullcontext(silent) as report:
        tokenizer = load_tokenizer(model)
        rows = load_sequences(data, tokenizer, length, responses_only=responses_only, report=report)
        if held_out_data:
            kept = load_sequences(held_out_data, tokenizer, length, report=report).part(slice(0, held_out))
        else:
            rows, kept = rows.split(held_out)
        loaded = load_model(
            model, dtype=dtype, experts_on_cpu=experts_on_cpu, gradient_checkpointing=gradient_checkpointing
        )
        moe = adapt(loaded)
        needs = estimate(moe, config, length, gradient_checkpointing=gradient_checkpointing or experts_on_cpu)
        if accelerator.is_main_process:
            host = f" and {format_size(needs.host)} of experts on the host" if needs.host else ""
            click.echo(
                f"{moe.model_type}: {moe.layers} MoE layers, top {moe.top_k} of {moe.experts} experts; training "
                f"{needs.trained:,} router weights, {len(rows)} sequences of {length}, {len(kept)} held out; memory "
                f"about {format_size(needs.memory)}{host}, "
                f"{needs.flops_per_step * config.steps / 1e15:.2g} PFLOP in all",
                err=True,
            )
        # Matrix products of a float32 model in bfloat16; what that gains is in docs/tuning.md.
        fast = torch.bfloat16 if accelerator.device.type == "cpu" and dtype == "auto" else None
        begin = time.monotonic()

        def first_step(row: dict[str, Any]) -> None:
            if row["step"] == 1:
                click.echo(
                    f"about {row['seconds'] * config.steps / 60:.0f} minutes, without looks at held-out text", err=True
                )

        result = tune(
            moe,
            rows,
            kept,
            config,
            folder=work,
            accelerator=accelerator,
            autocast=fast,
            report=report,
            on_step=first_step,
        )
        said = card(result, config, model=model, data=rows.files, length=length, held_out=len(kept))
        seconds = round(time.monotonic() - begin, 1)
        if not accelerator.is_main_process:
            return
        if result.stopped and "loss of step" in result.stopped and result.after.step == 0:
            raise RemoeError(f"{result.stopped}, and no state before it was good: use a smaller --lr")
        write_card(said, output.with_suffix(".md"))
        if export_hf is not None:
            export_checkpoint(
                Path(model),
                result.router,
                export_hf,
                said=said,
                dtype=DTYPES.get(export_router_dtype or ""),
                report=report,
            )
        # The last, so that the same command goes on until all is there.
        write_router(result.router, said, output, force=force)
    if as_json:
        click.echo(json.dumps({**said, "seconds": seconds}))
        return
    before, after = result.before, result.after
    if result.stopped:
        click.echo(f"Ended early: {result.stopped}", err=True)
    if after.step == 0:
        click.echo("No state reused more within the guards; the router written is the base's.", err=True)
    click.echo(
        f"reuse rate {before.reuse_rate:.1%} -> {after.reuse_rate:.1%} "
        f"({after.reuse_rate / before.reuse_rate - 1:+.1%}), perplexity {before.ppl:.3f} -> "
        f"{after.ppl:.3f} ({after.ppl / before.ppl - 1:+.2%}), "
        f"KL {after.kl:.4f} nats, on {len(kept)} held-out sequences at step {after.step}",
        err=True,
    )
    click.echo(output)
