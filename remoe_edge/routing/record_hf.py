"""Recording routing traces of a Hugging Face checkpoint, as `record` does of a GGUF. Needs the extra ``tune``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.measure.workloads import Prompt
from remoe_edge.progress import Report, silent
from remoe_edge.routing.record import Recording, cut
from remoe_edge.routing.trace import Trace


def record_hf_decode(
    folder: Path,
    prompts: Sequence[Prompt],
    n_tokens: int,
    *,
    chat: bool = False,
    probs: bool = False,
    n_threads: int | None = None,
    report: Report = silent,
) -> Recording:
    """As `record_decode`, of the model in a folder."""
    tokenizer = _load(folder, n_threads)
    sequences = [_prompt_tokens(folder, tokenizer, prompt, chat) for prompt in prompts]
    trace = _trace(folder, sequences, generate=n_tokens, probs=probs, report=report)
    trace.meta["prompts"] = [prompt.name for prompt in prompts]
    return Recording(trace, n_prompt=sum(map(len, sequences)), interrupted=False)


def record_hf_forced(
    folder: Path,
    text: str,
    *,
    length: int = 512,
    limit: int | None = None,
    name: str = "text",
    probs: bool = False,
    n_threads: int | None = None,
    report: Report = silent,
) -> Recording:
    """As `record_forced`, of the model in a folder."""
    tokenizer = _load(folder, n_threads)
    # Some tokenizers end a text, too.
    begin = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    trace = _trace(folder, cut(begin, body, length, limit, name), probs=probs, report=report)
    trace.meta["text"] = name
    return Recording(trace, n_prompt=0, interrupted=False)


def _load(folder: Path, n_threads: int | None) -> Any:
    """The tokenizer; sets PyTorch's threads."""
    if n_threads is not None:
        _module("torch", folder).set_num_threads(n_threads)
    return _module("remoe_edge.tuning.load", folder).load_tokenizer(str(folder))


def _trace(folder: Path, sequences: Sequence[Sequence[int]], **options: Any) -> Trace:
    length = max(map(len, sequences))
    trace = _module("remoe_edge.tuning.hf_trace", folder).trace_hf(str(folder), sequences, length=length, **options)
    assert isinstance(trace, Trace)
    return trace


def _module(name: str, folder: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RemoeError(
            f"{folder} is a folder, and a Hugging Face model needs PyTorch ({error}); pip install 'remoe-edge[tune]'"
        ) from error


def _prompt_tokens(folder: Path, tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    if chat and not tokenizer.chat_template:
        raise RemoeError(f"{folder}: has no chat template; leave out --chat")
    templated = chat or (prompt.chat and bool(tokenizer.chat_template))
    text = prompt.text
    if templated:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # A chat template writes out the special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    if not tokens:
        raise RemoeError(f"prompt {prompt.name!r} is empty; give some text")
    return tokens
