"""GGUFs on the runtime: what a device runs, quantised as it is there, held against each other. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.reader import Experts, Ids, Noise, Pass, noise
from remoe_edge.files import scratch_folder
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.progress import Report, silent
from remoe_edge.routing.trace import Trace, load_trace
from remoe_edge.runtime.llama import CacheConfig, Model, Session, load_model
from remoe_edge.tuning.data import load_sequences

_BATCH, _OTHER_BATCH = 128, 96
_NOISE_ROWS = 4


class GgufTokenizer:
    """A GGUF's tokenizer as `load_sequences` wants one."""

    chat_template = None

    def __init__(self, model: Model) -> None:
        self._model = model
        self.bos_token = None
        self.eos_token_id = model.end_token

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._model.tokenize(text, add_special=add_special_tokens)}


class GgufReader:
    """A `Reader` of GGUFs with the same tokens and shape. Obtained from `open_ggufs`."""

    def __init__(self, models: Mapping[str, Model], size: tuple[int, int, int], kind: str, threads: int | None) -> None:
        self.names = list(models)
        self.kind = kind
        self.layers, self.experts, self.top_k = size
        self._models = models
        self._threads = threads

    @property
    def _base(self) -> Model:
        return self._models[self.names[0]]

    def sequences(self, path: Path, length: int, report: Report = silent) -> Ids:
        return load_sequences([path], GgufTokenizer(self._base), length, report=report).ids

    def text_bytes(self, rows: Ids) -> int:
        return sum(len(self._base.piece(token)) for token in rows[:, 1:].ravel().tolist())

    def read(self, rows: Ids, report: Report = silent) -> list[Pass]:
        with ExitStack() as stack:
            sessions = [stack.enter_context(self._session(model, rows)) for model in self._models.values()]
            return self._read(sessions, [_BATCH] * len(sessions), rows, report)

    def write(self, prompts: Ids, tokens: int, report: Report = silent) -> list[Pass]:
        passes = []
        for index, model in enumerate(self._models.values()):
            written = []
            with model.session(n_ctx=prompts.shape[1] + tokens + 1, n_threads=self._threads) as session:
                for row, prompt in enumerate(prompts.tolist()):
                    report("writing", (index + row / len(prompts)) / len(self.names))
                    session.clear()
                    session.decode(prompt)
                    with _traced(session) as chosen:
                        # The last token that is generated is not evaluated.
                        for _ in session.generate(tokens + 1):
                            pass
                    written.append(_experts(chosen[0]))
            passes.append(Pass(np.stack(written)))
        return passes

    def noise(self, rows: Ids, report: Report = silent) -> list[Noise]:
        """Tokens evaluated in batches of another size, as prefill and decode do."""
        rows = rows[:_NOISE_ROWS]
        with self._session(self._base, rows) as one, self._session(self._base, rows) as other:
            base, again = self._read([one, other], [_BATCH, _OTHER_BATCH], rows, report)
        return [noise(f"{_OTHER_BATCH} tokens at a time instead of {_BATCH}", base, again)]

    @contextmanager
    def _session(self, model: Model, rows: Ids) -> Iterator[Session]:
        with model.session(n_ctx=rows.shape[1], n_batch=_BATCH, n_ubatch=_BATCH, n_threads=self._threads) as session:
            yield session

    def _read(self, sessions: Sequence[Session], batches: Sequence[int], rows: Ids, report: Report) -> list[Pass]:
        nlls = [np.zeros((len(rows), rows.shape[1] - 1), np.float32) for _ in sessions]
        kls = [np.zeros_like(nlls[0]) for _ in sessions]
        with ExitStack() as stack:
            traces = [stack.enter_context(_traced(session)) for session in sessions]
            for index, row in enumerate(rows):
                report("reading", index / len(rows))
                logs: list[npt.NDArray[np.float32]] = []
                for side, (session, batch) in enumerate(zip(sessions, batches, strict=True)):
                    own = _log_probabilities(session, row[:-1].tolist(), batch)
                    nlls[side][index] = -own[np.arange(len(own)), row[1:]]
                    if side:
                        kls[side][index] = (np.exp(logs[0]) * (logs[0] - own)).sum(1)
                    else:
                        logs.append(own)
        shape = (len(rows), rows.shape[1] - 1, self.layers, self.top_k)
        return [
            Pass(_experts(trace[0]).reshape(shape), nll, kl if side else None)
            for side, (trace, nll, kl) in enumerate(zip(traces, nlls, kls, strict=True))
        ]


def _experts(trace: Trace) -> Experts:
    return trace.ids.astype(np.uint16)


def _log_probabilities(session: Session, tokens: list[int], batch: int) -> npt.NDArray[np.float32]:
    """[tokens, vocabulary], from an empty context."""
    session.clear()
    parts = []
    for start in range(0, len(tokens), batch):
        session.decode(tokens[start : start + batch], all_logits=True)
        logits = session.all_logits()
        logits -= logits.max(axis=1, keepdims=True)
        parts.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return np.concatenate(parts)


@contextmanager
def _traced(session: Session) -> Iterator[list[Trace]]:
    """A list that holds, when the context has ended, what was chosen in it."""
    found: list[Trace] = []
    with scratch_folder("remoe-edge-trace-") as folder:
        path = folder / "trace.npz"
        session.trace_start(path)
        yield found
        session.trace_stop()
        found.append(load_trace(path))


@contextmanager
def open_ggufs(
    paths: Mapping[str, Path], *, expert_cache: str = "off", threads: int | None = None
) -> Iterator[GgufReader]:
    """Load models to hold against the first.

    `expert_cache` is a budget as in `CacheConfig`, for each of them: they are all loaded at once.

    Raises RemoeError if one has other experts or other tokens than the first.
    """
    with ExitStack() as stack:
        models: dict[str, Model] = {}
        shapes: dict[str, Any] = {}
        for name, path in paths.items():
            layout = read_model(path)[0]
            kind = layout.text("general.architecture") or ""
            if not layout.integer(f"{kind}.expert_count"):
                raise RemoeError(f"{path}: has no experts, so there is no routing to evaluate")
            # Without rearranged weights: these would be a copy in memory of each model.
            models[name] = stack.enter_context(load_model(path, CacheConfig(expert_cache), repack=False))
            shapes[name] = (kind, *_shape(models[name]))
            first = next(iter(models))
            if shapes[name] != shapes[first] or models[name].n_vocab != models[first].n_vocab:
                raise RemoeError(
                    f"{path}: is not the model of {paths[first]} with another router: "
                    f"{_said(models[name], shapes[name])} against {_said(models[first], shapes[first])}"
                )
        kind, *shape = shapes[first]
        yield GgufReader(models, (shape[0], shape[1], shape[2]), kind, threads)


def _shape(model: Model) -> tuple[int, int, int]:
    """MoE layers, experts and experts per token, as they are recorded."""
    with model.session(n_ctx=8, n_threads=1) as session:
        with _traced(session) as found:
            session.decode([0])
        return found[0].layers, found[0].experts, found[0].top_k


def _said(model: Model, shape: tuple[str, int, int, int]) -> str:
    kind, layers, experts, top_k = shape
    return f"{kind} of {layers} layers with top {top_k} of {experts} experts and {model.n_vocab} tokens"
