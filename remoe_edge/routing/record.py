"""Recording routing traces of a GGUF on the patched runtime: of its own greedy output, or of a given text.

Kernels are the plain ones, so that a trace does not depend on whether and how experts are cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import scratch_folder
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.bench import fingerprint
from remoe_edge.measure.workloads import Prompt
from remoe_edge.progress import Report, silent
from remoe_edge.routing.trace import Trace, load_trace
from remoe_edge.runtime.llama import CacheConfig, Model, Session, default_threads, load_model

_FORCED_BATCH = 128
"""Tokens of a given text evaluated at once; the logits of each are kept, or the last layer would be skipped."""


@dataclass(frozen=True)
class Recording:
    """A trace, and how it came about.

    Attributes
    ----------
    trace
        One sequence for each prompt, or each piece of the text; those without a token are left out.
    n_prompt
        Tokens of prompts: evaluated, not in the trace.
    interrupted
        Whether Ctrl-C ended it: the trace holds the tokens evaluated until then.
    """

    trace: Trace
    n_prompt: int
    interrupted: bool


def record_decode(
    model: Path,
    prompts: Sequence[Prompt],
    n_tokens: int,
    cache: CacheConfig,
    *,
    chat: bool = False,
    probs: bool = False,
    n_threads: int | None = None,
    report: Report = silent,
) -> Recording:
    """The routing of a model's own greedy output: up to `n_tokens` tokens after each prompt, which are not recorded.

    A prompt that is a user's message is put into the model's chat template if it has one; with `chat` every prompt is.
    The model's end token ends a sequence. Raises RemoeError if the model cannot be loaded, if `chat` finds no template,
    or if nothing was recorded.
    """
    with load_model(model, cache, repack=False) as loaded:
        tokens = [_prompt_tokens(loaded, prompt, chat) for prompt in prompts]
        n_ctx = max(map(len, tokens)) + n_tokens
        with loaded.session(n_ctx=n_ctx, n_threads=n_threads or default_threads()) as session:
            recorder = _Recorder(session, probs, report, len(tokens))
            interrupted = recorder.run(f"{model.name}, own output", (_own(session, each, n_tokens) for each in tokens))
            meta = {"phase": "decode", "prompts": [prompt.name for prompt in prompts]}
            return recorder.finish(model, loaded, meta, sum(map(len, tokens[: recorder.begun])), interrupted)


def _own(session: Session, prompt: list[int], n_tokens: int) -> Iterator[float]:
    session.clear()
    session.decode(prompt)
    yield 0.0
    # Of n + 1 tokens the last is chosen and not evaluated.
    for index, token in enumerate(session.generate(n_tokens + 1)):
        yield index / n_tokens
        if session.is_end(token):
            return


def record_forced(
    model: Path,
    text: str,
    cache: CacheConfig,
    *,
    length: int = 512,
    limit: int | None = None,
    name: str = "text",
    probs: bool = False,
    n_threads: int | None = None,
    report: Report = silent,
) -> Recording:
    """The routing of a given text, cut into sequences of `length` tokens, the first `limit` of them.

    Each begins with the token that the model begins texts with, if it does. Raises RemoeError as `record_decode`.
    """
    with load_model(model, cache, repack=False) as loaded:
        chunks = cut(loaded.tokenize("")[:1], loaded.tokenize(text, add_special=False), length, limit, name)
        batch = min(length, _FORCED_BATCH)
        threads = n_threads or default_threads()
        with loaded.session(n_ctx=length, n_batch=batch, n_ubatch=batch, n_threads=threads) as session:
            recorder = _Recorder(session, probs, report, len(chunks))
            interrupted = recorder.run(f"{model.name}, {name}", (_given(session, each, batch) for each in chunks))
            return recorder.finish(model, loaded, {"phase": "teacher-forced", "text": name}, 0, interrupted)


def _given(session: Session, tokens: list[int], batch: int) -> Iterator[float]:
    session.clear()
    for start in range(0, len(tokens), batch):
        yield start / len(tokens)
        session.decode(tokens[start : start + batch], all_logits=True)


def cut(begin: list[int], tokens: list[int], length: int, limit: int | None, name: str) -> list[list[int]]:
    """Sequences of `length` tokens, each beginning with `begin`, the first `limit` of them.

    Raises RemoeError if there are no tokens; `name` is what it calls the text.
    """
    if not tokens:
        raise RemoeError(f"{name}: holds no text")
    step = length - len(begin)
    return [begin + tokens[start : start + step] for start in range(0, len(tokens), step)][:limit]


class _Recorder:
    """Makes one recording per sequence, and one trace of all."""

    def __init__(self, session: Session, probs: bool, report: Report, count: int) -> None:
        self.begun = 0
        self._session = session
        self._probs = probs
        self._report = report
        self._count = count
        self._traces: list[Trace] = []

    def run(self, stage: str, sequences: Iterable[Iterator[float]]) -> bool:
        """Record what each sequence evaluates from its first yield on; whether Ctrl-C ended it.

        A sequence yields the part of it that is done.
        """
        with scratch_folder("remoe-edge-trace-") as folder:
            try:
                for sequence in sequences:
                    self._report(stage, self.begun / self._count)
                    next(sequence)
                    self.begun += 1
                    with self._recording(folder / "sequence.npz"):
                        for part in sequence:
                            self._report(stage, (self.begun - 1 + part) / self._count)
            except KeyboardInterrupt:
                return True
        return False

    @contextmanager
    def _recording(self, path: Path) -> Iterator[None]:
        self._session.trace_start(path, probs=self._probs)
        try:
            yield
        finally:
            # Without a token there is nothing to write, which the runtime calls a failure.
            with suppress(RemoeError):
                self._session.trace_stop()
            if path.exists():
                self._traces.append(load_trace(path))
                path.unlink()

    def finish(
        self, path: Path, model: Model, meta: Mapping[str, object], n_prompt: int, interrupted: bool
    ) -> Recording:
        if not self._traces:
            if interrupted:
                raise KeyboardInterrupt
            raise RemoeError(f"{path}: no token was recorded; the model ended at once, or it has no experts")
        layouts = read_model(path)
        trace = join(self._traces)
        details = {
            "model_fingerprint": fingerprint(layouts),
            "model_bytes": sum(layout.path.stat().st_size for layout in layouts),
            "source": f"remoe-edge {__version__} trace",
            "licence": model.metadata("general.license") or "",
            **meta,
        }
        trace = replace(trace, meta={**trace.meta, **details}, origin=str(path))
        return Recording(trace, n_prompt, interrupted)


def join(traces: Sequence[Trace]) -> Trace:
    """One trace of all sequences, with the meta of the first. Raises RemoeError if their shapes do not agree."""
    starts = np.cumsum([0, *(trace.tokens for trace in traces)])
    first = traces[0]
    for trace in traces:
        if trace.ids.shape[1:] != first.ids.shape[1:] or (trace.probs is None) != (first.probs is None):
            raise RemoeError(f"{trace.origin}: is not of the same model, or not recorded alike, as {first.origin}")
    return Trace(
        ids=np.concatenate([trace.ids for trace in traces]),
        offs=np.concatenate([[0], *(trace.offs[1:] + start for trace, start in zip(traces, starts, strict=False))]),
        meta=first.meta,
        probs=None if first.probs is None else np.concatenate([t.probs for t in traces if t.probs is not None]),
        origin=first.origin,
    )


def _prompt_tokens(model: Model, prompt: Prompt, chat: bool) -> list[int]:
    templated = chat or (prompt.chat and model.has_chat_template)
    text = model.chat_prompt(prompt.text) if templated else prompt.text
    # A chat template writes out the special tokens itself.
    tokens = model.tokenize(text, add_special=not templated)
    if not tokens:
        raise RemoeError(f"prompt {prompt.name!r} is empty; give some text")
    return tokens
