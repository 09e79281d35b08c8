"""`remoe-edge serve`: an OpenAI-compatible server on the expert cache."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from remoe_edge.demo_model import resolve
from remoe_edge.errors import RemoeError
from remoe_edge.parameters import cache_options, gpu_layers_option
from remoe_edge.power.find import SOURCES
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig
from remoe_edge.serve.front import Limits, is_loopback, read_keys
from remoe_edge.serve.plan import CHATML, Options, Plan, make_plan, parts
from remoe_edge.serve.server import Address, Ready, Server
from remoe_edge.sizes import format_size, parse_size

_KEY_VARIABLE = "LLAMA_API_KEY"


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 chooses a free one.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="What everything together may take: weights, KV cache, compute buffers, experts, this program. Context and "
    "budget are chosen to fit; enforced where control groups permit.",
)
@cache_options
@click.option(
    "--repack",
    type=click.Choice(["auto", "on", "off"]),
    help="Repack experts for this CPU's kernels when they are read. [default: auto: if the budget holds all of them]",
)
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    metavar="TOKENS",
    type=click.IntRange(min=64),
    help="Context of each slot. [default: the largest that leaves three quarters of the memory to experts]",
)
@click.option("-np", "--slots", type=click.IntRange(1, 64), default=2, show_default=True, help="Answers at a time.")
@click.option("--queue", type=click.IntRange(0, 1024), default=16, show_default=True, help="Requests that may wait.")
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@gpu_layers_option
@click.option(
    "--prompt-cache",
    metavar="SIZE",
    default="0",
    show_default=True,
    help="Memory for prompts that have lost their slot, in whole MiB. What a slot holds is reused in any case.",
)
@click.option("--embeddings", is_flag=True, help="Serve embeddings; a model of whose kind that makes sense.")
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Jinja template of a conversation. [default: the model's; ChatML with tools if it has none]",
)
@click.option("--alias", metavar="NAME", help="Name of the model in the API. [default: the file's]")
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"Require one of these keys, one a line. [default: ${_KEY_VARIABLE}, if set]",
)
@click.option(
    "--max-request",
    metavar="SIZE",
    help="Largest request. [default: 32 bytes per token of the context, at least 1 MiB]",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    help="For one request, its wait included.",
)
@click.option(
    "--client-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=30,
    show_default=True,
    help="For a client to send its request, or to take a part of the answer.",
)
@click.option(
    "--power",
    metavar="SENSOR",
    type=click.Choice(["auto", *SOURCES]),
    default="auto",
    show_default=True,
    help=f"Power sensor for the metrics: auto, {', '.join(SOURCES)}.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the command of the model process, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan on stdout as one JSON object, once ready.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama-server's log on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    host: str,
    port: int,
    memory: str | None,
    budget: str | None,
    policy: str | None,
    io: str | None,
    prefetch: str | None,
    cache_threads: int | str | None,
    verify: bool | None,
    warm: str | None,
    repack: str | None,
    n_ctx: int | None,
    slots: int,
    queue: int,
    threads: int | None,
    gpu_layers: int | str,
    prompt_cache: str,
    embeddings: bool,
    chat_template: Path | None,
    alias: str | None,
    api_key_file: Path | None,
    max_request: str | None,
    timeout: float,
    client_timeout: float,
    power: str,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Serve MODEL, a GGUF or the word demo, to OpenAI clients, with its experts in a bounded cache.

    \b
    remoe-edge serve model.gguf
    remoe-edge serve model.gguf --memory 1400MiB --slots 1

    The API is at http://HOST:PORT/v1, a page that shows the cache at work at /, metrics for Prometheus at /metrics, and
    /health is red (503) while the model is loaded or its storage fails. A model process that dies is started again.
    Runs until Ctrl-C or SIGTERM; then running answers get 10 seconds to end (SIGTERM). Exit status 130 or 143.
    """
    if budget == "off":
        for flag, value in {
            "--policy": policy,
            "--io": io,
            "--prefetch": prefetch,
            "--cache-threads": cache_threads,
            "--expert-cache-verify": verify,
            "--expert-cache-warm": warm,
            "--repack": repack,
        }.items():
            if value is not None:
                raise click.UsageError(f"{flag} has no effect with --expert-cache off.")
    model = resolve(model)
    if not model.is_file():
        raise RemoeError(f"{model}: no such file")
    keys = _keys(api_key_file)
    if not keys and not is_loopback(host):
        _say(
            f"warning: everyone who reaches {host}:{port} can use this server; give a key with --api-key-file or "
            f"${_KEY_VARIABLE}"
        )
    configured = (budget, policy, io, prefetch, cache_threads, verify, repack, warm) != (None,) * 8
    with stderr_progress() as report:
        runtime = ensure_runtime(report=report)
        report("planning", None)
        plan = make_plan(
            Options(
                model=model,
                cache=CacheConfig(
                    budget or "auto", policy, io, cache_threads, prefetch, repack, verify=verify, warm=warm
                )
                if configured
                else None,
                slots=slots,
                ctx=n_ctx,
                threads=threads,
                memory=parse_size(memory) if memory else None,
                prompt_cache=parse_size(prompt_cache),
                queue=queue,
                max_request=parse_size(max_request) if max_request else None,
                embeddings=embeddings,
                chat_template=chat_template,
                alias=alias,
                gpu_layers=gpu_layers,
            ),
            runtime,
        )
    if dry_run:
        shown = plan.command(runtime.bin_dir / "llama-server", Path("model.sock"))
        click.echo(json.dumps({"plan": plan.fields(), "command": shown}) if as_json else shlex.join(shown))
        click.echo(_plan_text(plan), err=True)
        return
    _say(_plan_text(plan))

    def ready(state: Ready) -> None:
        loading.close()
        if as_json:
            click.echo(json.dumps({"plan": plan.fields(), **asdict(state)}))
        _say(_ready_text(state, bool(keys)))

    with ExitStack() as loading:
        server = Server(
            plan,
            runtime,
            Address(host, port),
            limits=Limits(timeout, client_timeout),
            keys=keys,
            power=power,
            on_ready=ready,
            say=_say,
            log=lambda level, line: _say(f"{level} {line}") if verbose else None,
            report=loading.enter_context(stderr_progress()),
        )
        number = server.run()
    ctx.exit(128 + number)


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return [key] if (key := os.environ.get(_KEY_VARIABLE)) else []
    keys = read_keys(file)
    if not keys:
        raise RemoeError(f"{file}: holds no key; write one, or leave out --api-key-file")
    return keys


def _say(text: str) -> None:
    click.echo(text, err=True)


def _plan_text(plan: Plan) -> str:
    lines = [
        f"{plan.alias}: {plan.slots} slots of {plan.ctx} tokens (trained on {plan.n_ctx_train}), "
        f"{plan.threads} threads, at most {plan.queue} requests waiting",
        "memory: " + ", ".join(f"{name} {format_size(size)}" for name, size in parts(plan).items()),
    ]
    if plan.budget is not None and plan.memory is not None:
        lines[1] += (
            f", expert cache {format_size(plan.budget)}: together {format_size(plan.fixed + plan.budget)} of "
            f"{format_size(plan.memory)}"
        )
    elif plan.cache.enabled:
        lines[1] += f", expert cache {plan.cache.budget}"
        if plan.memory is not None:
            lines[1] += f": within {format_size(plan.memory)}"
    if plan.chat_template == CHATML:
        lines.append("the model has no chat template: conversations are put into ChatML, which it may not know")
    return "\n".join(lines)


def _ready_text(state: Ready, with_key: bool) -> str:
    lines = []
    if cache := state.cache:
        lines.append(
            f"expert cache: {format_size(cache['used_bytes'])} of {format_size(cache['budget_bytes'])}, "
            f"{cache['slots']} slots in each of {cache['layers']} layers (floor {format_size(cache['floor_bytes'])}, "
            f"all experts {format_size(cache['expert_bytes'])}), policy {cache['policy']}, {cache['io']} reads, "
            f"{cache['kernels']} kernels"
        )
    if state.limited:
        lines.append("a control group keeps the model process within --memory")
    elif state.not_limited:
        lines.append(f"--memory is kept by planning alone: {state.not_limited}")
    key = ", with a key" if with_key else ""
    lines.append(f"ready after {state.start_s:.1f} s: {state.url} (API: {state.url}/v1{key}); Ctrl-C ends it")
    return "\n".join(lines)
