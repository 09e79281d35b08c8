"""`remoe-edge trace`: record which experts a model chooses."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from remoe_edge.errors import RemoeError
from remoe_edge.files import refuse_existing
from remoe_edge.gguf_io.layout import has_experts
from remoe_edge.measure.workloads import PACKAGED, Prompt, Workload, load_workload
from remoe_edge.progress import stderr_progress
from remoe_edge.routing.record import Recording, record_decode, record_forced
from remoe_edge.routing.record_hf import record_hf_decode, record_hf_forced
from remoe_edge.routing.selftest import SelfTest, self_test
from remoe_edge.routing.trace import save_trace
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig

_INTERRUPTED = 128 + signal.SIGINT
_DEFAULT_WORKLOAD = "text"
_DEFAULT_TOKENS = 128
_DEFAULT_LENGTH = 512


@click.command("trace")
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), required=True, help="The .npz to write."
)
@click.option("-p", "--prompt", "texts", metavar="TEXT", multiple=True, help="Text to go on from; may be repeated.")
@click.option(
    "--workload",
    metavar="NAME|FILE",
    help=f"Prompts instead of -p: {', '.join(PACKAGED)}, or a JSONL file. Questions are put into the model's chat "
    f"template where it has one. [default: {_DEFAULT_WORKLOAD}]",
)
@click.option("--chat", is_flag=True, help="Put every prompt into the model's chat template.")
@click.option(
    "-n",
    "--n-gen",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help=f"Most tokens to record after each prompt. [default: {_DEFAULT_TOKENS}]",
)
@click.option(
    "--teacher-forced",
    "forced",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Record the model while it reads this text (UTF-8), instead of its own output.",
)
@click.option(
    "--length",
    metavar="TOKENS",
    type=click.IntRange(min=2),
    help=f"Cut the text of --teacher-forced into sequences of this length. [default: {_DEFAULT_LENGTH}]",
)
@click.option(
    "--prompts", "limit", metavar="N", type=click.IntRange(min=1), help="Record the first N prompts or sequences only."
)
@click.option("--probs", is_flag=True, help="Record the router's probabilities of the chosen experts, too.")
@click.option(
    "--expert-cache",
    "budget",
    metavar="SIZE",
    help="Of a GGUF: budget of the expert cache, as in `run`; it does not change the trace. [default: auto]",
)
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the trace.")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    output: Path,
    texts: tuple[str, ...],
    workload: str | None,
    chat: bool,
    n_gen: int | None,
    forced: Path | None,
    length: int | None,
    limit: int | None,
    probs: bool,
    budget: str | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Record a routing trace of MODEL: which experts each MoE layer chooses for each token.

    \b
    remoe-edge trace model.gguf --workload gsm8k -n 256 -o trace.npz
    remoe-edge trace model.gguf --teacher-forced book.txt -o trace.npz
    remoe-edge simulate trace.npz

    MODEL is a GGUF, run on the patched llama.cpp, or the folder of a Hugging Face model (needs remoe-edge[tune]). By
    default the trace is of the model's own greedy output, without the prompts; with --teacher-forced of a given text.
    Texts of their own are sequences of their own.

    A trace is told to be suspect if neighbouring tokens share hardly more experts than chance would have it. Ctrl-C
    writes the tokens of a GGUF recorded so far, of a Hugging Face model nothing, and exits with status 130.
    """
    _check(model, texts, workload, chat, n_gen, forced, length, limit, budget)
    refuse_existing(output, force)
    prompts = () if forced else _prompts(texts, workload, limit).prompts
    cache = None if model.is_dir() else _cache(model, budget)
    with stderr_progress() as report:
        options: dict[str, Any] = {"probs": probs, "n_threads": threads, "report": report}
        if cache is not None:
            ensure_runtime(report=report)
        if forced is not None:
            options |= {"length": length or _DEFAULT_LENGTH, "limit": limit, "name": forced.name}
            text = _read(forced)
            recording = (
                record_forced(model, text, cache, **options) if cache else record_hf_forced(model, text, **options)
            )
        else:
            options |= {"chat": chat}
            n_tokens = n_gen or _DEFAULT_TOKENS
            recording = (
                record_decode(model, prompts, n_tokens, cache, **options)
                if cache
                else record_hf_decode(model, prompts, n_tokens, **options)
            )
    save_trace(recording.trace, output, force=force)
    test = self_test(recording.trace)
    if as_json:
        click.echo(json.dumps(_summary(output, recording, test)))
    click.echo(_text(output, recording, test), err=True)
    if recording.interrupted:
        ctx.exit(_INTERRUPTED)


def _check(
    model: Path,
    texts: tuple[str, ...],
    workload: str | None,
    chat: bool,
    n_gen: int | None,
    forced: Path | None,
    length: int | None,
    limit: int | None,
    budget: str | None,
) -> None:
    """Refuse flags without an effect."""
    if forced is not None:
        own: dict[str, object] = {"-p": texts, "--workload": workload, "--chat": chat, "-n": n_gen}
        for flag, value in own.items():
            if value:
                raise click.UsageError(f"{flag} has no effect with --teacher-forced.")
    elif length is not None:
        raise click.UsageError("--length has no effect without --teacher-forced.")
    if texts and workload is not None:
        raise click.UsageError("-p and --workload exclude each other.")
    if texts and limit is not None:
        raise click.UsageError("--prompts has no effect with -p.")
    if model.is_dir() and budget is not None:
        raise click.UsageError("--expert-cache has no effect on a Hugging Face model.")


def _prompts(texts: tuple[str, ...], workload: str | None, limit: int | None) -> Workload:
    if texts:
        return Workload("prompts", tuple(Prompt(f"prompt {n}", text) for n, text in enumerate(texts, start=1)))
    return load_workload(workload or _DEFAULT_WORKLOAD, limit)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RemoeError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _cache(model: Path, budget: str | None) -> CacheConfig:
    if not has_experts(model):
        raise RemoeError(f"{model}: has no experts, so there is no routing to record")
    return CacheConfig(budget or "auto")


def _summary(output: Path, recording: Recording, test: SelfTest) -> dict[str, Any]:
    trace = recording.trace
    return {
        "output": str(output),
        "model": trace.meta.get("model"),
        "phase": trace.meta.get("phase"),
        "tokens": trace.tokens,
        "sequences": len(trace.offs) - 1,
        "prompt_tokens": recording.n_prompt,
        "layers": trace.layers,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "probs": trace.probs is not None,
        "interrupted": recording.interrupted,
        **asdict(test),
    }


def _text(output: Path, recording: Recording, test: SelfTest) -> str:
    trace = recording.trace
    what = "read" if trace.meta.get("phase") == "teacher-forced" else "decoded"
    first = "Interrupted; wrote" if recording.interrupted else "Wrote"
    text = (
        f"{first} {output}: {trace.tokens} {what} tokens in {len(trace.offs) - 1} sequences, "
        f"{trace.layers} MoE layers, top {trace.top_k} of {trace.experts} experts."
    )
    label = {"ok": "Self-test", "suspect": "SUSPECT capture", "too short": "Self-test not possible"}[test.verdict]
    return f"{text}\n{label}: {test.reason}."
