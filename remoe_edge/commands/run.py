"""`remoe-edge run`: generate text, and say what the expert cache did."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from remoe_edge.commands.bench import check_route_bias
from remoe_edge.errors import RemoeError
from remoe_edge.files import refuse_existing
from remoe_edge.gguf_io.layout import has_experts
from remoe_edge.parameters import cache_options, gpu_layers_option, model_path, refuse
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import (
    DEFAULT_ROUTE_KEEP,
    MAX_ROUTE_BIAS,
    CacheConfig,
    Model,
    default_threads,
    load_model,
)
from remoe_edge.runtime.meter import Meter, summary_text

_INTERRUPTED = 128 + signal.SIGINT


@click.command("run")
@click.argument("model", type=model_path)
@click.option("-p", "--prompt", metavar="TEXT", required=True, help="Text to go on from.")
@click.option(
    "-n", "--n-gen", metavar="TOKENS", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens."
)
@cache_options
@click.option(
    "--route-bias",
    metavar="LAMBDA",
    type=click.FloatRange(0, MAX_ROUTE_BIAS, min_open=True),
    help="LOSSY: prefer experts in the cache by LAMBDA times the mean range of the router's logits (arXiv 2412.00099): "
    "fewer reads, other output. [default: the model's own routing]",
)
@click.option(
    "--route-keep",
    metavar="N",
    type=click.IntRange(min=0),
    help=f"With --route-bias the router's own first N choices stay. [default: {DEFAULT_ROUTE_KEEP}]",
)
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@gpu_layers_option
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Size of the context. [default: what prompt and -n need]",
)
@click.option("--temp", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this part of the probability.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of the draws. [default: 0]")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--trace", metavar="FILE", type=click.Path(path_type=Path), help="Record which experts are used (.npz).")
@click.option("--force", is_flag=True, help="Overwrite an existing --trace.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with the text and the summary, at the end."
)
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    prompt: str,
    n_gen: int,
    budget: str | None,
    policy: str | None,
    io: str | None,
    prefetch: str | None,
    route_bias: float | None,
    route_keep: int | None,
    cache_threads: int | str | None,
    verify: bool | None,
    warm: str | None,
    threads: int | None,
    gpu_layers: int | str,
    n_ctx: int | None,
    temp: float,
    top_p: float | None,
    seed: int | None,
    chat: bool,
    trace: Path | None,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Generate text from MODEL, a GGUF or the word demo, with its experts in a bounded cache.

    \b
    remoe-edge run model.gguf -p "The capital of France is" --expert-cache 880MiB

    Text goes to stdout; what the cache did goes to stderr. Ctrl-C ends the generation, prints the summary, and exits
    with status 130.
    """
    if budget == "off":
        given: dict[str, object] = {
            "--policy": policy,
            "--io": io,
            "--prefetch": prefetch,
            "--route-bias": route_bias,
            "--cache-threads": cache_threads,
            "--expert-cache-verify": verify,
            "--expert-cache-warm": warm,
        }
        refuse(given, "with --expert-cache off")
    check_route_bias([route_bias] if route_bias else [], route_keep, [prefetch] if prefetch else [])
    if temp == 0:
        refuse({"--top-p": top_p, "--seed": seed}, "with --temp 0")
    if force and trace is None:
        raise click.UsageError("--force has no effect without --trace.")
    if trace is not None:
        refuse_existing(trace, force)
    config = CacheConfig(
        budget=budget or ("auto" if has_experts(model) else "off"),
        policy=policy,
        io=io,
        threads=cache_threads,
        prefetch=prefetch,
        route_bias=route_bias,
        route_keep=route_keep,
        verify=verify,
        warm=warm,
    )
    if route_bias and not config.enabled:
        raise RemoeError(f"{model}: has no experts to prefer; leave out --route-bias")
    with stderr_progress() as report:
        ensure_runtime(report=report)
    with load_model(model, config, gpu_layers=gpu_layers, verbose=verbose) as loaded:
        tokens = _prompt_tokens(loaded, prompt, chat)
        size = n_ctx or len(tokens) + n_gen
        if len(tokens) >= size:
            raise RemoeError(f"the prompt has {len(tokens)} tokens, but the context only {size}; raise --ctx")
        with loaded.session(n_ctx=size, n_threads=threads or default_threads()) as session:
            if trace is not None:
                session.trace_start(trace)
            meter = Meter(session)
            text, interrupted = "", False
            count = min(n_gen, size - len(tokens))
            try:
                session.decode(tokens)
                chosen = meter.follow(session.generate(count, temp=temp, top_p=top_p or 1.0, seed=seed or 0))
                for piece in session.stream_text(chosen):
                    if as_json:
                        text += piece
                    else:
                        click.echo(piece, nl=False)
            except KeyboardInterrupt:
                interrupted = True
            if trace is not None:
                session.trace_stop()
            summary = {"n_prompt": len(tokens), "interrupted": interrupted, **meter.summary()}
    if as_json:
        click.echo(json.dumps({"text": text, **summary}))
    else:
        click.echo()
    click.echo(summary_text(summary), err=True)
    if interrupted:
        ctx.exit(_INTERRUPTED)


def _prompt_tokens(model: Model, prompt: str, chat: bool) -> list[int]:
    # A chat template writes out the special tokens itself.
    tokens = model.tokenize(model.chat_prompt(prompt), add_special=False) if chat else model.tokenize(prompt)
    if not tokens:
        raise RemoeError("the prompt is empty; give some text with --prompt")
    return tokens
