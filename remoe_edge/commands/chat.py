"""`remoe-edge chat`: talk with a model in a terminal."""

from __future__ import annotations

import json
import secrets
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import click

from remoe_edge.chat.conversation import PLAIN_N_GEN, Answer, Conversation
from remoe_edge.chat.lines import Lines
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import has_experts
from remoe_edge.parameters import cache_options, gpu_layers_option, model_path, refuse
from remoe_edge.power.find import SOURCES, find_source
from remoe_edge.power.source import NoSource
from remoe_edge.progress import stderr_progress
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import (
    CacheConfig,
    Session,
    default_threads,
    load_model,
)
from remoe_edge.runtime.meter import cache_text
from remoe_edge.sizes import format_size

_INTERRUPTED = 128 + signal.SIGINT
_DEFAULT_CTX = 4096
_HELP = """\
/stats               speed, hits, reads and power of the last answer
/save [--force] FILE write the conversation: as text, or as JSON to a FILE that ends with .json
/reset               forget the conversation
/help                this list
/quit                end; so do Ctrl-D, and Ctrl-C twice at an empty prompt
Ctrl-C stops an answer. A line that ends with \\ goes on in the next; a pasted text is one message.
To send a message that begins with a slash, begin it with two."""
_COMMANDS = ("/stats", "/save ", "/reset", "/help", "/quit")


@click.command("chat")
@click.argument("model", type=model_path)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "-n",
    "--n-gen",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help=f"Most tokens of an answer. [default: what the context holds; {PLAIN_N_GEN} without a chat template]",
)
@cache_options
@click.option(
    "-t", "--threads", metavar="THREADS", type=click.IntRange(min=1), help="Compute threads. [default: physical cores]"
)
@gpu_layers_option
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    metavar="TOKENS",
    type=click.IntRange(min=16),
    help=f"Size of the context. [default: {_DEFAULT_CTX}, or what the model was trained with if that is less]",
)
@click.option("--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from this part of the probability. [default: 0.95]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of the draws. [default: another one each time]")
@click.option(
    "--power",
    metavar="SENSOR",
    type=click.Choice(["auto", *SOURCES]),
    default="auto",
    show_default=True,
    help=f"Power sensor: auto, {', '.join(SOURCES)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer, with what it took.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    system: str | None,
    n_gen: int | None,
    budget: str | None,
    policy: str | None,
    io: str | None,
    prefetch: str | None,
    cache_threads: int | str | None,
    verify: bool | None,
    warm: str | None,
    threads: int | None,
    gpu_layers: int | str,
    n_ctx: int | None,
    temp: float,
    top_p: float | None,
    seed: int | None,
    power: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Talk with MODEL, a GGUF or the word demo, with its experts in a bounded cache.

    \b
    remoe-edge chat model.gguf --expert-cache 880MiB
    echo "What is a cache?" | remoe-edge chat model.gguf --json

    Only what is new is evaluated at each turn. When the context is full, the oldest turns go. /help lists what else can
    be typed. From a pipe, each line is a message; answers go to stdout, all else to stderr.

    A model without a chat template goes on from the text so far. Exit status: 1 if a message had no answer.
    """
    if budget == "off":
        refuse({"--policy": policy, "--io": io}, "with --expert-cache off")
        refuse(
            {
                "--prefetch": prefetch,
                "--cache-threads": cache_threads,
                "--expert-cache-verify": verify,
                "--expert-cache-warm": warm,
            },
            "with --expert-cache off",
        )
    if temp == 0:
        refuse({"--top-p": top_p, "--seed": seed}, "with --temp 0")
    budget = budget or ("auto" if has_experts(model) else "off")
    config = CacheConfig(budget, policy, io, cache_threads, prefetch, verify=verify, warm=warm)
    sensor = find_source(power).source
    sensor.close()
    with stderr_progress() as report:
        ensure_runtime(report=report)
    with load_model(model, config, gpu_layers=gpu_layers, verbose=verbose) as loaded:
        size = n_ctx or min(_DEFAULT_CTX, loaded.n_ctx_train)
        with loaded.session(n_ctx=size, n_threads=threads or default_threads()) as session:
            conversation = Conversation(
                session,
                system=system,
                n_gen=n_gen,
                temp=temp,
                top_p=top_p or 0.95,
                seed=secrets.randbits(32) if seed is None else seed,
                power=None if isinstance(sensor, NoSource) else lambda: find_source(sensor.name).source,
            )
            _say(_greeting(session, conversation))
            status = _Chat(conversation, Lines(_COMMANDS), as_json).run()
    ctx.exit(status)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _greeting(session: Session, conversation: Conversation) -> str:
    lines = [
        f"{session.path.name}: {session.description}, context of {session.n_ctx} tokens",
        cache_text(session.info(), session.kernels),
    ]
    if not conversation.templated:
        lines.append("It has no chat template: it goes on from the text so far instead of answering.")
    return "\n".join([*lines, "/help lists what else can be typed."])


class _Chat:
    """Reads messages, prints answers, obeys commands."""

    def __init__(self, conversation: Conversation, lines: Lines, as_json: bool) -> None:
        self._conversation = conversation
        self._lines = lines
        self._as_json = as_json
        self._failed = False

    def run(self) -> int:
        """Until the end of input; returns the exit status."""
        interrupts = 0
        while True:
            try:
                message = self._lines.read()
                if message is None:
                    if self._lines.interactive:
                        _say("")
                    break
                interrupts = 0
                if not self._obey(message):
                    break
            except KeyboardInterrupt:
                if not self._lines.interactive:
                    return _INTERRUPTED
                interrupts = 0 if self._lines.interrupted_typing else interrupts + 1
                if interrupts > 1:
                    _say("")
                    break
                _say("\nCtrl-C again or Ctrl-D ends." if interrupts else "")
            except RemoeError as error:
                self._failed = True
                _say(f"Error: {error}")
        # A person has seen the errors, and went on.
        return int(self._failed and not self._lines.interactive)

    def _obey(self, message: str) -> bool:
        """Whether to go on."""
        word, _, rest = message.strip().partition(" ")
        if not word:
            return True
        if not word.startswith("/") or "\n" in message:
            return self._answer(message)
        if word.startswith("//"):
            return self._answer(message.strip()[1:])
        if word == "/quit":
            return False
        if word == "/help":
            _say(_HELP)
        elif word == "/stats":
            _say(_stats(self._conversation))
        elif word == "/reset":
            self._conversation.reset()
            _say("The conversation is forgotten.")
        elif word == "/save":
            self._save(rest)
        else:
            raise RemoeError(f"there is no {word}; /help lists what there is, and // begins a message with a slash")
        return True

    def _answer(self, message: str) -> bool:
        """Whether to go on: Ctrl-C stops an answer to a person, and ends the program that reads a pipe."""
        conversation, text = self._conversation, ""
        try:
            with _interrupts(conversation):
                for piece in conversation.answer(message):
                    text += piece
                    if not self._as_json:
                        click.echo(piece, nl=False)
        except RemoeError as error:
            if self._as_json:
                click.echo(json.dumps({"prompt": message, "text": text, "error": str(error)}))
            elif text:
                click.echo()
            raise
        answer = conversation.answers[-1]
        if self._as_json:
            click.echo(json.dumps(_json(message, answer)))
        elif not text.endswith("\n") or self._lines.interactive:
            click.echo()
        if answer.n_dropped:
            _say(f"[the context was full: the {_count(answer.n_dropped, 'oldest turn')} went]")
        if answer.ended == "stopped":
            _say("[stopped]")
            if not self._lines.interactive:
                raise KeyboardInterrupt
        elif answer.ended == "context":
            _say("[the context is full]")
        return True

    def _save(self, arguments: str) -> None:
        try:
            words = shlex.split(arguments)
        except ValueError as error:
            raise RemoeError(f"/save: {error}") from error
        force = "--force" in words
        names = [word for word in words if word != "--force"]
        if len(names) != 1:
            raise RemoeError("give /save one file name")
        path = Path(names[0]).expanduser()
        if path.exists() and not force:
            raise RemoeError(f"{path} exists; /save --force {shlex.quote(names[0])} overwrites it")
        self._conversation.save(path, force=force)
        _say(f"{_count(len(self._conversation.turns), 'turn')} in {path}")


@contextmanager
def _interrupts(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C stops the answer. No exception: it would tear the model's state where it happens to be."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        conversation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _json(message: str, answer: Answer) -> dict[str, object]:
    fields = asdict(answer)
    return {"prompt": message, **fields.pop("measured"), **fields}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _stats(conversation: Conversation) -> str:
    session = conversation.session
    lines = []
    if conversation.answers:
        last = conversation.answers[-1]
        took = last.measured
        first = f"last answer: {_count(took['n_gen'], 'token')}"
        if took["tokens_per_s"] is not None:
            first += f", {took['tokens_per_s']:.1f} tokens/s, TPOT {took['tpot_ms']:.1f} ms"
        if took["ttft_ms"] is not None:
            first += f", TTFT {took['ttft_ms']:.0f} ms"
        lines += [first, f"prompt: {_count(last.n_prompt, 'new token')}, {last.n_reused} reused"]
        if took["hit_rate"] is not None:
            lines.append(
                f"experts: {took['hit_rate']:.1%} hits, {took['bytes_per_token'] / 1e6:.2f} MB read and "
                f"{took['stall_ms_per_token']:.1f} ms stalled per token"
            )
        watts = "not measured" if last.watts is None else f"{last.watts:.1f} W"
        joules = "" if last.joules_per_token is None else f", {last.joules_per_token:.2f} J per token"
        lines.append(f"power: {watts}{joules}")
    lines.append(f"history: {_count(len(conversation.turns), 'turn')}; {session.n_past} of {session.n_ctx} tokens held")
    lines.append(cache_text(session.info(), session.kernels))
    stats = session.stats()
    if stats is not None and stats.hit_rate is not None:
        read = format_size(stats.bytes_demand + stats.bytes_prefetch)
        lines.append(f"since the start: {stats.hit_rate:.1%} hits, {read} read, {stats.evictions} evictions")
    return "\n".join(lines)
