"""Looks into llama.cpp while it decodes: which experts every layer chose, and the logits.

Works with any build of the library behind llama-cpp-python, patched or not.
"""

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NOT_COMPUTED = -1


@dataclass(frozen=True)
class Observation:
    tokens: list[int]
    """[n]: the token with the largest logit, step by step."""
    ids: npt.NDArray[np.int32]
    """[len(prompt) + n - 1, MoE layers, k]: the experts of every evaluated token; -1 where a layer was not computed."""
    logits: npt.NDArray[np.float32]
    """[n, vocabulary]: the logits that each token was taken from."""
    router: npt.NDArray[np.float32]
    """[len(prompt) + n - 1, MoE layers, experts]: the logits of every router; NaN where a layer was not computed."""


class _TensorHead(ctypes.Structure):
    """The first fields of ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


@dataclass
class _Recorder:
    """Collects the ids and router logits of one llama_decode, by block number."""

    chosen: dict[int, list[npt.NDArray[np.int32]]] = field(default_factory=dict)
    scores: dict[int, list[npt.NDArray[np.float32]]] = field(default_factory=dict)

    def callback(self, address: int, ask: bool, _user_data: int | None) -> bool:
        match = re.fullmatch(r"ffn_moe_(topk|logits)-(\d+)", _ggml().ggml_get_name(address).decode())
        if match and not ask and match[1] == "topk":
            self.chosen.setdefault(int(match[2]), []).append(_read(address, np.int32))
        elif match and not ask:
            self.scores.setdefault(int(match[2]), []).append(_read(address, np.float32))
        # When asked: whether this tensor is wanted. Afterwards: whether to go on.
        return match is not None or not ask

    def take(self, tokens: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """[tokens, layers, k] and [tokens, layers, experts] of the last decode."""
        found = (
            _by_layer(self.chosen, tokens, np.int32(NOT_COMPUTED)),
            _by_layer(self.scores, tokens, np.float32(np.nan)),
        )
        self.chosen.clear()
        self.scores.clear()
        return found


def _by_layer(blocks: dict[int, list[Any]], tokens: int, blank: Any) -> npt.NDArray[Any]:
    layers = [np.concatenate(blocks[block]) for block in sorted(blocks)]
    width = layers[0].shape[1] if layers else 0
    rows = np.full((tokens, len(layers), width), blank)
    for layer, values in enumerate(layers):
        # The last layer computes only the tokens whose logits are wanted, here the last one.
        rows[tokens - len(values) :, layer] = values
    return rows


@cache
def _ggml() -> ctypes.CDLL:
    """The ggml that libllama itself uses: its symbols are found through libllama's."""
    from llama_cpp import llama_cpp

    library: ctypes.CDLL = llama_cpp._lib
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return library


def _read(address: int, kind: Any) -> npt.NDArray[Any]:
    """[tokens, k] of a tensor of four-byte numbers, possibly a view on the first k columns of a longer row."""
    head = _TensorHead.from_address(address)
    k, tokens = head.ne[0], head.ne[1]
    if tokens == 0:
        # A ubatch of a prompt without a token whose logits are wanted.
        return np.empty((0, k), dtype=kind)
    size = (tokens - 1) * head.nb[1] + k * head.nb[0]
    data = (ctypes.c_uint8 * size)()
    _ggml().ggml_backend_tensor_get(address, data, 0, size)
    ids = np.ndarray((tokens, k), dtype=kind, buffer=data, strides=(head.nb[1], head.nb[0]))
    return ids.copy()


def observe_routing(
    model: Path,
    prompt: Sequence[int],
    n: int,
    *,
    forced: Sequence[int] = (),
    overrides: Mapping[str, str | int | float] | None = None,
    threads: int = 1,
    ubatch: int = 512,
    repack: bool = False,
) -> Observation:
    """Decode ``n`` tokens greedily after ``prompt`` and tell what happened.

    While there are ``forced`` tokens, they are fed instead of the greedy ones: tiny models soon repeat themselves.
    ``overrides`` go into kv_overrides, which is where the expert cache takes its configuration from. With ``repack``
    llama.cpp may store weights in another order than the file has. Raises RuntimeError with the library's log if the
    model does not load or a decode fails.
    """
    with _kept_log() as log:
        return _observe(model, prompt, n, forced, overrides or {}, threads, ubatch, repack, log)


@contextmanager
def _kept_log() -> Iterator[list[str]]:
    """What llama.cpp would have printed."""
    import llama_cpp

    log: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        log.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        # The callback dies with this frame.
        llama_cpp.llama_log_set(before, data)


def _observe(
    model: Path,
    prompt: Sequence[int],
    n: int,
    forced: Sequence[int],
    overrides: Mapping[str, str | int | float],
    threads: int,
    ubatch: int,
    repack: bool,
    log: list[str],
) -> Observation:
    import llama_cpp

    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = repack
    model_params.kv_overrides = _overrides(overrides)
    handle = llama_cpp.llama_model_load_from_file(str(model).encode(), model_params)
    if not handle:
        raise RuntimeError(f"{model} does not load:\n{''.join(log)}")
    context = None
    try:
        recorder = _Recorder()
        callback = llama_cpp.ggml_backend_sched_eval_callback(recorder.callback)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(prompt) + n
        params.n_batch = max(ubatch, len(prompt))
        params.n_ubatch = ubatch
        params.n_threads = params.n_threads_batch = threads
        params.cb_eval = callback
        context = llama_cpp.llama_init_from_model(handle, params)
        if not context:
            raise RuntimeError(f"no context for {model}:\n{''.join(log)}")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle))
        taken, logits, tokens = [], np.empty((n, vocabulary), dtype=np.float32), []
        batch = list(prompt)
        for step in range(n):
            array = (llama_cpp.llama_token * len(batch))(*batch)
            status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(batch)))
            if status != 0:
                raise RuntimeError(f"decode returned {status}:\n{''.join(log)}")
            taken.append(recorder.take(len(batch)))
            row = llama_cpp.llama_get_logits_ith(context, -1)
            logits[step] = np.ctypeslib.as_array(row, shape=(vocabulary,))
            tokens.append(int(logits[step].argmax()))
            batch = [forced[step] if step < len(forced) else tokens[-1]]
        ids, router = (np.concatenate(rows) for rows in zip(*taken, strict=True))
        return Observation(tokens, ids, logits, router)
    finally:
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(handle)


def tokenize(model: Path, text: str) -> list[int]:
    """The tokens of ``text``, without BOS unless the model asks for it."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with _kept_log() as log:
        handle = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not handle:
            raise RuntimeError(f"{model} does not load:\n{''.join(log)}")
        try:
            data = text.encode()
            tokens = (llama_cpp.llama_token * (len(data) + 2))()
            vocabulary = llama_cpp.llama_model_get_vocab(handle)
            count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, False)
            return list(tokens[:count])
        finally:
            llama_cpp.llama_model_free(handle)


def _overrides(values: Mapping[str, str | int | float]) -> "ctypes.Array[ctypes.Structure] | None":
    import llama_cpp

    if not values:
        return None
    # The list ends with an empty key.
    result = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for override, (key, value) in zip(result, values.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            override.value.val_str = value.encode()
        elif isinstance(value, float):
            override.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT
            override.value.val_f64 = value
        else:
            override.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
    return result
