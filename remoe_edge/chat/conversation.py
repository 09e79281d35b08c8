"""Turns of a conversation on one context, which keeps what it has evaluated: a turn evaluates its new tokens only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output
from remoe_edge.power.energy import window_energy
from remoe_edge.power.sampler import Recording, Sampler
from remoe_edge.power.source import PowerSource
from remoe_edge.runtime.llama import DecodingStoppedError, Session
from remoe_edge.runtime.meter import Meter

PLAIN_N_GEN = 256
"""Most tokens of an answer without a chat template: such models seldom end by themselves."""

_ANSWER_SHARE, _KEEP_SHARE = 4, 2  # of the context: left for an answer; taken by history once turns were dropped


@dataclass(frozen=True)
class Turn:
    """What was said, and the answer, which may have been stopped."""

    user: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Attributes
    ----------
    n_prompt, n_reused
        Tokens evaluated before the first of the answer, and those of earlier turns that were still there.
    n_dropped
        Oldest turns that were forgotten before, because the context could not hold them.
    ended
        "end": by the model; "length": `n_gen` tokens; "context": it is full; "stopped".
    watts, joules_per_token
        Mean between the first and the last token; None where they were not measured.
    measured
        `Meter.summary`.
    """

    text: str
    n_prompt: int
    n_reused: int
    n_dropped: int
    ended: str
    watts: float | None
    joules_per_token: float | None
    measured: dict[str, Any]


class Conversation:
    """Messages go in, answers come out; the history is kept.

    Without a chat template the model goes on from the text so far, with each message on a new line.
    """

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        n_gen: int | None = None,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        power: Callable[[], PowerSource] | None = None,
    ) -> None:
        """Sampling as in `Session.generate`, where the number of turns is added to `seed`. `power` opens a sensor.

        Raises RemoeError if there is a `system` prompt which the model's template, or the lack of one, does not allow.
        """
        self.session = session
        self.turns: list[Turn] = []
        self.answers: list[Answer] = []
        """All since the start, `reset` or not."""
        self.templated = session.has_chat_template
        if system is not None and not self.templated:
            raise RemoeError(f"{session.path}: has no chat template, so a system prompt has no place; leave it out")
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self._n_gen = n_gen or (session.n_ctx if self.templated else PLAIN_N_GEN)
        self._temp, self._top_p, self._seed = temp, top_p, seed
        self._power = power
        self._stopped = False
        # What the context holds, or the beginning of it: the tokens, and the text they stand for.
        self._tokens: list[int] = []
        self._text = ""
        self._render([], "")

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []

    def stop(self) -> None:
        """End the answer that is being made, within an operation of the model. May be called by a signal handler."""
        self._stopped = True

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text` as it is made; `answers[-1]` has it all when this has ended.

        Raises RemoeError, and leaves the history as it was, if `text` is longer than the context or an expert cannot be
        read. A `stop` ends it without an error; the turn is kept if some of the answer was there.
        """
        turns, prompt, rendered = self._fit(text)
        n_dropped = len(self.turns) - len(turns)
        # At least one token has to be evaluated for its logits.
        n_reused = self.session.keep(min(self._n_common(prompt), len(prompt) - 1))
        self._tokens, self._text = list(prompt), rendered
        room = self.session.n_ctx - len(prompt)
        count, pieces = min(self._n_gen, room), [""]
        self._stopped = False
        meter = Meter(self.session)
        with Sampler(self._power()) if self._power else nullcontext() as sampler:
            try:
                self.session.stop_when(lambda: self._stopped)
                self.session.decode(prompt[n_reused:])
                self.session.stop_when(None)
                seed = (self._seed + len(self.answers)) % 2**32
                generated = self.session.generate(count, temp=self._temp, top_p=self._top_p, seed=seed)
                for piece in self.session.stream_text(self._until_stopped(meter.follow(generated))):
                    pieces.append(piece)
                    yield piece
            except DecodingStoppedError:
                pass
            except BaseException:
                # Tokens of half a character would have no text.
                self._tokens = prompt
                raise
            finally:
                self.session.stop_when(None)
        chosen = len(self._tokens) - len(prompt)
        self._text += "".join(pieces)
        if self._stopped:
            ended = "stopped"
        elif chosen < len(meter.times_ns):
            ended = "end"
        else:
            ended = "length" if count < room else "context"
        if chosen or not self._stopped:
            self.turns = [*turns, Turn(text, "".join(pieces))]
        watts, joules = _energy(sampler.recording(), meter) if sampler else (None, None)
        measured = meter.summary()
        self.answers.append(
            Answer("".join(pieces), len(prompt) - n_reused, n_reused, n_dropped, ended, watts, joules, measured)
        )

    def _until_stopped(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self._tokens.append(token)
            yield token
            if self._stopped:
                return

    def _fit(self, text: str) -> tuple[list[Turn], list[int], str]:
        """The newest turns that leave room for an answer to `text`, and the prompt of them all as tokens and text."""
        n_ctx = self.session.n_ctx
        turns = self.turns
        tokens, rendered = self._prompt(turns, text)
        if len(tokens) + min(self._n_gen, n_ctx // _ANSWER_SHARE) > n_ctx:
            # More than has to go: else each turn from now on would evaluate all that is left again.
            while turns and len(tokens) > n_ctx // _KEEP_SHARE:
                turns = turns[1:]
                tokens, rendered = self._prompt(turns, text)
        if len(tokens) >= n_ctx:
            raise RemoeError(f"the message has {len(tokens)} tokens, but the context only {n_ctx}; raise --ctx")
        return turns, tokens, rendered

    def _prompt(self, turns: Sequence[Turn], text: str) -> tuple[list[int], str]:
        rendered = self._render(turns, text)
        if self._tokens and rendered.startswith(self._text):
            # Not all tokens over again: those of an answer need not be the ones that its text would become.
            rest = rendered[len(self._text) :]
            return self._tokens + (self.session.tokenize(rest, add_special=False) if rest else []), rendered
        # A chat template writes out the special tokens itself.
        tokens = self.session.tokenize(rendered, add_special=not self.templated)
        if not tokens:
            raise RemoeError("the message is empty")
        return tokens, rendered

    def _render(self, turns: Sequence[Turn], text: str) -> str:
        if self.templated:
            return self.session.render_chat([*self._system, *_messages(turns), {"role": "user", "content": text}])
        rendered = ""
        for said in [*(turn.user + turn.answer for turn in turns), text]:
            rendered += said if not rendered or rendered.endswith("\n") else "\n" + said
        return rendered

    def _n_common(self, prompt: Sequence[int]) -> int:
        """How many of the first tokens of `prompt` the context holds."""
        held = self._tokens[: self.session.n_past]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt, strict=False)))

    def messages(self) -> list[dict[str, str]]:
        """The history as the OpenAI API takes it."""
        return [*self._system, *_messages(self.turns)]

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the history: as JSON, {"messages": [...]}, to a name that ends with .json, else as text."""
        if path.suffix == ".json":
            text = json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=2) + "\n"
        elif self.templated:
            text = "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages()) + "\n"
        else:
            text = "".join(turn.user + turn.answer + "\n" for turn in self.turns)
        with atomic_output(path, force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _messages(turns: Sequence[Turn]) -> Iterator[dict[str, str]]:
    for turn in turns:
        yield {"role": "user", "content": turn.user}
        yield {"role": "assistant", "content": turn.answer}


def _energy(recording: Recording, meter: Meter) -> tuple[float | None, float | None]:
    """Mean watts, and joules per token, from the first token to the last."""
    if len(meter.times_ns) < 2:
        return None, None
    window = window_energy(recording, meter.times_ns[0], meter.times_ns[-1])
    joules = window.joules / (len(meter.times_ns) - 1) if window.joules is not None else None
    return window.mean_w, joules
