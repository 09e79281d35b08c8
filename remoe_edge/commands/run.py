"""`remoe-edge run`: generate text, and say what the expert cache did."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from remoe_edge.commands.bench import check_route_bias
from remoe_edge.errors import RemoeError
from remoe_edge.files import refuse_existing
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import (
    DEFAULT_ROUTE_KEEP,
    MAX_ROUTE_BIAS,
    POLICIES,
    PREFETCHES,
    READ_MODES,
    CacheConfig,
    Model,
    Session,
    default_threads,
    load_model,
)
from remoe_edge.sizes import format_size

_INTERRUPTED = 128 + signal.SIGINT


@click.command("run")
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-p", "--prompt", metavar="TEXT", required=True, help="Text to go on from.")
@click.option(
    "-n", "--n-gen", metavar="TOKENS", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens."
)
@click.option(
    "--expert-cache",
    "budget",
    metavar="SIZE",
    help="Budget of the expert cache: bytes (880MiB), slots per layer (16s), auto, or off for stock llama.cpp. "
    "[default: auto; off for a model without experts]",
)
@click.option("--policy", type=click.Choice(POLICIES), help=f"Which experts keep their slots. [default: {POLICIES[0]}]")
@click.option("--io", type=click.Choice(READ_MODES), help="How experts are read. [default: auto]")
@click.option(
    "--prefetch",
    type=click.Choice(PREFETCHES),
    help="Read ahead what the next layer's router would choose now. [default: off]",
)
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
@click.option("--cache-threads", metavar="N", type=click.IntRange(1, 64), help="Reader threads. [default: 4]")
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
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
    cache_threads: int | None,
    threads: int | None,
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
    """Generate text from MODEL, a GGUF, with its experts in a bounded cache.

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
        }
        _refuse(given, "with --expert-cache off")
    check_route_bias([route_bias] if route_bias else [], route_keep, [prefetch] if prefetch else [])
    if temp == 0:
        _refuse({"--top-p": top_p, "--seed": seed}, "with --temp 0")
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
    )
    if route_bias and not config.enabled:
        raise RemoeError(f"{model}: has no experts to prefer; leave out --route-bias")
    with stderr_progress() as report:
        ensure_runtime(report=report)
    with load_model(model, config, verbose=verbose) as loaded:
        tokens = _prompt_tokens(loaded, prompt, chat)
        size = n_ctx or len(tokens) + n_gen
        if len(tokens) >= size:
            raise RemoeError(f"the prompt has {len(tokens)} tokens, but the context only {size}; raise --ctx")
        with loaded.session(n_ctx=size, n_threads=threads or default_threads()) as session:
            if trace is not None:
                session.trace_start(trace)
            run = _Run(session, len(tokens))
            count = min(n_gen, size - len(tokens))
            try:
                session.decode(tokens)
                chosen = run.follow(session.generate(count, temp=temp, top_p=top_p or 1.0, seed=seed or 0))
                for text in session.stream_text(chosen):
                    if as_json:
                        run.text += text
                    else:
                        click.echo(text, nl=False)
            except KeyboardInterrupt:
                run.interrupted = True
            if trace is not None:
                session.trace_stop()
            summary = run.summary()
    if as_json:
        click.echo(json.dumps({"text": run.text, **summary}))
    else:
        click.echo()
    click.echo(_summary_text(summary), err=True)
    if run.interrupted:
        ctx.exit(_INTERRUPTED)


def has_experts(path: Path) -> bool:
    """Whether a GGUF says that its model has experts. Raises RemoeError if it is no GGUF."""
    layout = read_model(path)[0]
    architecture = layout.text("general.architecture")
    return bool(layout.integer(f"{architecture}.expert_count"))


def _refuse(flags: dict[str, object], where: str) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise click.UsageError(f"{flag} has no effect {where}.")


def _prompt_tokens(model: Model, prompt: str, chat: bool) -> list[int]:
    # A chat template writes out the special tokens itself.
    tokens = model.tokenize(model.chat_prompt(prompt), add_special=False) if chat else model.tokenize(prompt)
    if not tokens:
        raise RemoeError("the prompt is empty; give some text with --prompt")
    return tokens


class _Run:
    """Watches a generation: when each token came, and what the cache did after the first."""

    def __init__(self, session: Session, n_prompt: int) -> None:
        self.text = ""
        self.interrupted = False
        self._session = session
        self._n_prompt = n_prompt
        self._start = time.monotonic()
        self._times: list[float] = []

    def follow(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens, up to the one that ends the generation."""
        for token in tokens:
            self._times.append(time.monotonic())
            if len(self._times) == 1:
                self._session.reset_stats()
            if self._session.is_end(token):
                return
            yield token

    def summary(self) -> dict[str, Any]:
        times, steps = self._times, len(self._times) - 1
        stats, info = self._session.stats(), self._session.info()
        measured = stats is not None and steps > 0
        return {
            "n_prompt": self._n_prompt,
            "n_gen": len(times),
            "interrupted": self.interrupted,
            "ttft_ms": (times[0] - self._start) * 1e3 if times else None,
            "tpot_ms": (times[-1] - times[0]) / steps * 1e3 if steps > 0 else None,
            "kernels": self._session.kernels,
            "route_bias": info.route_bias if info else None,
            "route_keep": info.route_keep if info else None,
            "cache": asdict(info) if info else None,
            "hit_rate": stats.hit_rate if stats and measured else None,
            "bytes_per_token": (stats.bytes_demand + stats.bytes_prefetch) / steps if stats and measured else None,
            "stall_ms_per_token": stats.stall_ns / 1e6 / steps if stats and measured else None,
        }


def _summary_text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['n_prompt']} tokens of prompt, {summary['n_gen']} generated"]
    if summary["ttft_ms"] is not None:
        lines[0] += f"; TTFT {summary['ttft_ms']:.0f} ms"
    if summary["tpot_ms"] is not None:
        lines[0] += f", TPOT {summary['tpot_ms']:.1f} ms = (last - first token) / (n - 1)"
    cache = summary["cache"]
    if cache is None:
        return "\n".join([*lines, f"no expert cache; {summary['kernels']} kernels"])
    lines.append(
        f"expert cache: {format_size(cache['used'])} of {format_size(cache['budget'])}, {cache['n_slots']} slots in "
        f"each of {cache['n_layers']} layers (floor {format_size(cache['floor'])}), policy {cache['policy']}, "
        f"{cache['io']} reads with {cache['n_threads']} threads, {cache['kernels']} expert kernels"
    )
    if summary["route_bias"] is not None:
        lines.append(
            f"LOSSY: route bias {summary['route_bias']:g} preferred experts in the cache, the router's first "
            f"{summary['route_keep']} stayed; the output is not the model's own"
        )
    if summary["hit_rate"] is not None:
        lines.append(
            f"after the first token: {summary['hit_rate']:.1%} hits, {summary['bytes_per_token'] / 1e6:.1f} MB read "
            f"and {summary['stall_ms_per_token']:.1f} ms stalled per token"
        )
    return "\n".join(lines)
