"""Routing traces of a Hugging Face model: on given text, or on what it writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remoe_edge.errors import RemoeError
from remoe_edge.progress import Report, silent
from remoe_edge.routing.trace import Trace
from remoe_edge.tuning.adapters import MoE, Routing, adapt, fresh_cache, record
from remoe_edge.tuning.export import apply_router
from remoe_edge.tuning.load import load_model, load_tokenizer


def trace_hf(
    model: str,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    generate: int = 0,
    probs: bool = False,
    router: Path | None = None,
    length: int = 2048,
    dtype: str = "auto",
    experts_on_cpu: bool = False,
    report: Report = silent,
) -> Trace:
    """What the routers of a model choose, one sequence of the trace for each of `texts`.

    Parameters
    ----------
    model
        Folder or hub id of a checkpoint.
    texts
        Strings, which the model's tokenizer turns into tokens, or lists of token ids.
    generate
        0: the given tokens are traced, each with all before it (teacher forcing). Else so many tokens that the model
        decodes greedily after each text, fewer where it ends one, are traced, and the text is not.
    probs
        Keep the weights of the chosen experts, too: their part of the router's distribution over all experts.
    router
        A tuned router, .safetensors, in place of the model's own.
    length
        Most tokens of a text; the rest is left out.

    Raises RemoeError for a model that is not supported or cannot be loaded, a router that is not its own, a text
    without tokens and ids that the model does not have.
    """
    loaded = load_model(model, dtype=dtype, experts_on_cpu=experts_on_cpu)
    moe = adapt(loaded)
    if router is not None:
        apply_router(moe, router)
    trace = trace_model(moe, tokenize(model, texts, length, moe), generate=generate, probs=probs, report=report)
    trace.meta.update(model=model, **({"router": str(router)} if router else {}))
    return trace


def tokenize(
    model: str, texts: Sequence[str] | Sequence[Sequence[int]], length: int, moe: MoE
) -> list[npt.NDArray[np.int64]]:
    """Token ids of each text, at most `length`. Raises RemoeError for a text without any and for ids out of range."""
    tokenizer = load_tokenizer(model) if any(isinstance(text, str) for text in texts) else None
    config: Any = moe.model.config
    sequences = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text)["input_ids"] if tokenizer is not None and isinstance(text, str) else text
        sequence = np.asarray(ids[:length], np.int64)
        if not len(sequence):
            raise RemoeError(f"text {number} of {len(texts)} has no tokens")
        if sequence.min() < 0 or sequence.max() >= config.vocab_size:
            wrong = sequence[(sequence < 0) | (sequence >= config.vocab_size)][0]
            raise RemoeError(
                f"text {number} of {len(texts)}: token {wrong} is not one of the model's {config.vocab_size}"
            )
        sequences.append(sequence)
    if not sequences:
        raise RemoeError("there is no text to trace")
    return sequences


@torch.no_grad()
def trace_model(
    moe: MoE,
    sequences: Sequence[npt.NDArray[np.int64]],
    *,
    generate: int = 0,
    probs: bool = False,
    report: Report = silent,
) -> Trace:
    """`trace_hf` for a model in memory and token ids."""
    moe.model.eval()
    parts = []
    for index, sequence in enumerate(sequences):
        report("tracing", index / len(sequences))
        ids = torch.from_numpy(sequence)[None].to(next(moe.model.parameters()).device)
        parts.append(_decode(moe, ids, generate, probs) if generate else _read(moe, ids, probs))
    chosen, weights = zip(*parts, strict=True)
    config: Any = moe.model.config
    return Trace(
        ids=np.concatenate(chosen).astype(np.uint8 if moe.experts <= 256 else np.uint16),
        offs=np.concatenate([[0], np.cumsum([len(part) for part in chosen])]).astype(np.int64),
        meta={
            "model": str(config.name_or_path),
            "layers": moe.layers,
            "experts": moe.experts,
            "top_k": moe.top_k,
            "phase": "decode" if generate else "teacher-forced",
            "source": f"remoe-edge, transformers {config.transformers_version or 'of unknown version'}",
        },
        probs=np.concatenate(weights) if probs else None,
    )


Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""ids and weights [tokens, layers, k] of some tokens."""


def _read(moe: MoE, ids: Tensor, probs: bool) -> Part:
    with record(moe) as routings:
        moe.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return _part(routings, probs)


def _decode(moe: MoE, ids: Tensor, tokens: int, probs: bool) -> Part:
    """Each token that the model writes is fed back and traced, as a decode run does; the last one, too."""
    model: Any = moe.model
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    kept = fresh_cache(model)
    out = model(input_ids=ids, logits_to_keep=1, **kept)
    parts = []
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        with record(moe) as routings:
            out = model(input_ids=token, **kept)
        parts.append(_part(routings, probs))
        if int(token) in ends:
            break
    chosen, weights = zip(*parts, strict=True)
    return np.concatenate(chosen), np.concatenate(weights)


def _part(routings: Sequence[Routing], probs: bool) -> Part:
    ids = torch.stack([routing.ids.cpu() for routing in routings], 1)
    if not probs:
        return ids.numpy(), np.zeros((len(ids), 0, 0), np.float32)
    weights = torch.stack([routing.probs.gather(-1, routing.ids).cpu() for routing in routings], 1)
    return ids.numpy(), weights.float().numpy()
