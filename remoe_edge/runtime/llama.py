"""Models on the patched runtime: loading, decoding, and what the expert cache did.

A thin layer over the C API of llama.cpp as llama-cpp-python declares it, plus the functions of ``llama-expert.h``,
found in the same loaded library. Nothing here is safe for use by two threads at once.
"""

from __future__ import annotations

import codecs
import ctypes
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.runnable import check_runnable
from remoe_edge.runtime.gpu import Device, find_devices, layers_on_gpu

Logits = npt.NDArray[np.float32]

POLICIES = ("next-use", "lfu", "lru")
"""Replacement policies of the runtime; the first is its default."""

MAX_ROUTE_BIAS = 4.0
DEFAULT_ROUTE_KEEP = 1
READ_MODES = ("auto", "direct", "mmap")
PREFETCHES = ("off", "router", "auto")

_LOG_ERROR, _LOG_CONTINUED = 4, 5  # enum ggml_log_level
_LOG_LINES_KEPT = 200


class RuntimeReadError(RemoeError, RuntimeError):
    """An evaluation failed; the text names what the expert cache could not read, where that was the reason."""


class DecodingStoppedError(RemoeError):
    """The function given to `Session.stop_when` ended an evaluation."""


@dataclass(frozen=True)
class CacheConfig:
    """How a model's experts are held; None leaves the choice to the runtime.

    Attributes
    ----------
    budget
        Bytes ("880MiB"), slots per layer ("16s"), "auto", or "off": stock llama.cpp.
    policy
        One of `POLICIES`.
    io
        Read mode: "auto", "direct", "mmap".
    threads
        Reader threads; "auto": as many as the storage wants, found by reading at the first load and remembered.
    prefetch
        "router": read ahead what the next layer's router would choose now; "auto": in layers, and as long as, most of
        that is needed (off on a GPU); "off".
    repack
        "on" or "off": use this CPU's repacked kernels; "auto": if the budget holds all experts.
    route_bias, route_keep
        Lossy (cache-prior, arXiv 2412.00099): when one token is evaluated alone, routers prefer experts in the cache by
        `route_bias`, above 0 and at most `MAX_ROUTE_BIAS`, times the mean range of their logits; their own first
        `route_keep` choices stay. None: routing is the model's own, and the output exact.
    verify
        Compare every read with a checksum of the expert: wrong bytes are read once more, then are an error. Checksums
        are taken at load, which reads all experts once, and are 8 bytes for each expert of a tensor.
    warm
        A file: which experts have slots when the model is freed is written to it, and read at the next load.
    """

    budget: str = "auto"
    policy: str | None = None
    io: str | None = None
    threads: int | str | None = None
    prefetch: str | None = None
    repack: str | None = None
    route_bias: float | None = None
    route_keep: int | None = None
    verify: bool | None = None
    warm: str | None = None

    @property
    def enabled(self) -> bool:
        return self.budget != "off"


@dataclass(frozen=True)
class CacheInfo:
    """What the expert cache decided; sizes in bytes."""

    budget: int
    used: int
    floor: int
    expert_bytes: int
    n_layers: int
    n_slots: int
    """Per layer."""
    n_threads: int
    policy: str
    io: str
    kernels: str
    prefetch: str = "off"
    route_bias: float | None = None
    """None: routing is the model's own. See `CacheConfig`."""
    route_keep: int | None = None
    verify: bool = False
    warm: str = ""
    """Of `CacheConfig.warm`: "loaded", or why the start was cold."""
    bytes_loaded: int = 0
    """Read so far because of the load, not of a call; no counter has them."""


@dataclass(frozen=True)
class CacheStats:
    """Counters of the expert cache since load or the last reset; bytes and nanoseconds.

    Of what was read ahead, `bytes_prefetch`, the next call of the layer needed `bytes_prefetch_used`; experts that came
    this way count as hits, and as `hits_prefetch`.

    With experts on a GPU, `ids_ns` is the time until the router's ids were on the host, while the GPU computes what
    comes before them, and `remap_ns` the time from there to the launch, without `stall_ns`, while it is idle.

    With prefetch, of the `calls` before which experts were forecast (`forecasts`; for `forecasts_read` of them they
    were also read ahead) `forecast_experts` is how many of these experts were in no slot, `forecast_used` how many of
    those the call then needed, and `forecast_needed` how many it needed that were in no slot at the time of the
    forecast. `forecast_ns` is the time that compute took for forecasts.
    """

    calls: int
    calls_streamed: int
    hits: int
    misses: int
    evictions: int
    bytes_demand: int
    bytes_prefetch: int
    reads: int
    stall_ns: int
    read_ns: int
    hits_prefetch: int = 0
    bytes_prefetch_used: int = 0
    reads_wrong: int = 0
    """With `CacheConfig.verify`: reads that gave wrong bytes; each was made once more."""
    ids_ns: int = 0
    remap_ns: int = 0
    forecasts: int = 0
    forecasts_read: int = 0
    forecast_experts: int = 0
    forecast_used: int = 0
    forecast_needed: int = 0
    forecast_ns: int = 0

    @property
    def hit_rate(self) -> float | None:
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else None

    @property
    def forecast_precision(self) -> float | None:
        """Share of the experts forecast to be missed that the call needed."""
        return self.forecast_used / self.forecast_experts if self.forecast_experts else None

    @property
    def forecast_recall(self) -> float | None:
        """Share of the experts that a call would have missed that were forecast."""
        return self.forecast_used / self.forecast_needed if self.forecast_needed else None


class _Info(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("budget", "used", "floor", "expert_bytes")),
        *((name, ctypes.c_uint32) for name in ("n_layers", "n_slots", "n_threads")),
        *((name, ctypes.c_char_p) for name in ("policy", "io", "kernels", "prefetch")),
        ("route_bias", ctypes.c_double),
        ("route_keep", ctypes.c_int32),
        ("verify", ctypes.c_int32),
        ("warm", ctypes.c_char_p),
        ("bytes_loaded", ctypes.c_uint64),
    )


class _Stats(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in CacheStats.__dataclass_fields__)


def require_runtime() -> None:
    """Load the runtime's library. Raises RemoeError if it is missing, or not the patched one."""
    _llama()


@cache
def _llama() -> Any:
    """The module of llama-cpp-python that declares the C API, with the functions of the expert cache made callable."""
    try:
        module = importlib.import_module("llama_cpp.llama_cpp")
        library = module._lib
        pointer = ctypes.c_void_p
        for name, result, arguments in (
            ("llama_expert_cache_get_info", ctypes.c_bool, [pointer, pointer, ctypes.c_size_t]),
            ("llama_expert_cache_get_stats", ctypes.c_bool, [pointer, ctypes.c_int32, pointer, ctypes.c_size_t]),
            ("llama_expert_cache_reset_stats", None, [pointer]),
            ("llama_expert_cache_wait", None, [pointer]),
            ("llama_expert_cache_last_error", ctypes.c_char_p, [pointer]),
            ("llama_expert_cache_flip_byte", ctypes.c_bool, [pointer, ctypes.c_int32]),
            ("llama_expert_trace_start", ctypes.c_bool, [pointer, ctypes.c_char_p, ctypes.c_bool]),
            ("llama_expert_trace_stop", ctypes.c_bool, [pointer]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, FileNotFoundError) as error:
        raise RemoeError(f"the runtime is not installed ({error}); run `remoe-edge build`") from error
    except AttributeError as error:
        raise RemoeError(
            "the installed llama-cpp-python has no expert cache: it is not the patched one; run `remoe-edge build`"
        ) from error
    _log.install(module)
    module.llama_backend_init()
    return module


class _Log:
    """Takes llama.cpp's log lines: keeps the last ones for error messages, shows all of them on request."""

    def __init__(self) -> None:
        self.verbose = False
        self._lines: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES_KEPT)
        self._callback: Any = None

    def install(self, module: Any) -> None:
        # The library keeps the pointer, so the callback must live as long as the process.
        self._callback = module.llama_log_callback(self._take)
        module.llama_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode(errors="replace")
        if level == _LOG_CONTINUED and self._lines:
            level, before = self._lines.pop()
            self._lines.append((level, before + line))
        else:
            self._lines.append((level, line))
        if self.verbose:
            sys.stderr.write(line)

    def clear(self) -> None:
        self._lines.clear()

    def reason(self, fallback: str) -> str:
        """The most telling error line since `clear`."""
        errors = [line.strip() for level, line in self._lines if level == _LOG_ERROR and line.strip()]
        for line in errors:
            if "error loading model: " in line:
                return line.partition("error loading model: ")[2]
        # Lines start with the name of the function that wrote them.
        return errors[0].partition(": ")[2] or errors[0] if errors else fallback


_log = _Log()


class _Aborts:
    """Where llama.cpp finds that it cannot go on it aborts; this makes it a sentence and exit status 1.

    On some models whose metadata contradict each other it finds so while it builds a graph. Of those that are not
    refused by `check_runnable` the process cannot be saved: the state of the library is lost.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._callback: Any = None

    def install(self, library: Any, path: Path) -> None:
        """From now on `path` is the model to name."""
        self._path = path
        if self._callback is None:
            kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
            self._callback = kind(self._end)
            library.ggml_set_abort_callback.argtypes = [kind]
            library.ggml_set_abort_callback(self._callback)

    def _end(self, message: bytes) -> None:
        said = message.decode(errors="replace")
        text = f"Error: {self._path}: llama.cpp cannot go on with this model: {said}\n"
        os.write(2, text.encode(errors="replace"))
        # Not sys.exit: this may be any of llama.cpp's threads.
        os._exit(1)


_aborts = _Aborts()


class Model:
    """A loaded model: its vocabulary and its expert cache. Obtained from `load_model`."""

    def __init__(self, path: Path, handle: Any, *, repack: bool, gpu_layers: int = 0) -> None:
        self.path = path
        self.gpu_layers = gpu_layers
        self._model = handle
        self._repack = repack
        self._vocab = _llama().llama_model_get_vocab(handle)
        self.n_vocab: int = _llama().llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it become these tokens."""
        data = text.encode()
        room = len(data) + 2
        while True:
            buffer = (ctypes.c_int32 * room)()
            count = _llama().llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, True)
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; they need not be whole characters. Control tokens are empty unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = _llama().llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece(token) for token in tokens).decode(errors="replace")

    def stream_text(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of each token as it comes, in whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self.piece(token))
        yield decoder.decode(b"", final=True)

    def is_end(self, token: int) -> bool:
        """Whether the model ends its generation with this token."""
        return bool(_llama().llama_vocab_is_eog(self._vocab, token))

    @property
    def end_token(self) -> int | None:
        """The token that ends a text; None if the vocabulary has none."""
        token: int = _llama().llama_vocab_eos(self._vocab)
        return token if token >= 0 else None

    @property
    def has_chat_template(self) -> bool:
        return bool(_llama().llama_model_chat_template(self._model, None))

    def chat_prompt(self, text: str) -> str:
        """`text` as the message of a user, in the model's own chat template. Raises RemoeError if it has none."""
        if not self.has_chat_template:
            raise RemoeError(f"{self.path}: has no chat template; leave out --chat")
        return self.render_chat([{"role": "user", "content": text}])

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages ("role", "content") in the model's own chat template, up to where its answer begins.

        Raises RemoeError if it has no template, or one that refuses these messages, as some do a system prompt.
        """
        template = _llama().llama_model_chat_template(self._model, None)
        if not template:
            raise RemoeError(f"{self.path}: has no chat template")
        formats = importlib.import_module("llama_cpp.llama_chat_format")
        bos, eos = (
            self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""
            for token in (_llama().llama_vocab_bos(self._vocab), _llama().llama_vocab_eos(self._vocab))
        )
        try:
            formatter = formats.Jinja2ChatFormatter(template.decode(), eos_token=eos, bos_token=bos)
            return str(formatter(messages=messages).prompt)
        except (ValueError, TemplateError) as error:
            raise RemoeError(f"{self.path}: its chat template cannot be used here: {error}") from error

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF's metadata as text."""
        buffer = ctypes.create_string_buffer(1 << 16)
        count = _llama().llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if count >= 0 else None

    @property
    def description(self) -> str:
        """Architecture, size and quantisation, as llama-bench prints it."""
        buffer = ctypes.create_string_buffer(256)
        _llama().llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(_llama().llama_model_size(self._model))

    @property
    def n_params(self) -> int:
        return int(_llama().llama_model_n_params(self._model))

    @property
    def n_ctx_train(self) -> int:
        return int(_llama().llama_model_n_ctx_train(self._model))

    @property
    def kernels(self) -> str:
        """ "plain": expert weights are used as they are in the file; "repack": rearranged where the CPU gains by it."""
        info = self.info()
        return info.kernels if info else "repack" if self._repack else "plain"

    def info(self) -> CacheInfo | None:
        """What the expert cache decided; None without one. With budget "auto" complete once there is a session."""
        raw = _Info()
        if not _llama()._lib.llama_expert_cache_get_info(self._model, ctypes.byref(raw), ctypes.sizeof(raw)):
            return None
        values = {name: _value(getattr(raw, name)) for name in CacheInfo.__dataclass_fields__}
        if not raw.route_bias:
            values["route_bias"] = values["route_keep"] = None
        values["verify"] = bool(values["verify"])
        return CacheInfo(**values)

    def stats(self, layer: int | None = None) -> CacheStats | None:
        """Counters of one MoE layer, from 0, or of all; None without a cache or such a layer."""
        raw = _Stats()
        index = -1 if layer is None else layer
        if not _llama()._lib.llama_expert_cache_get_stats(self._model, index, ctypes.byref(raw), ctypes.sizeof(raw)):
            return None
        return CacheStats(*(getattr(raw, name) for name in CacheStats.__dataclass_fields__))

    def reset_stats(self) -> None:
        _llama()._lib.llama_expert_cache_reset_stats(self._model)

    def wait_loaded(self) -> None:
        """Return when the experts that are read at load are there: all if they fit, else those of a hot set."""
        _llama()._lib.llama_expert_cache_wait(self._model)

    def flip_byte(self, layer: int) -> bool:
        """For tests: invert one byte in a slot of an MoE layer; False if no slot of it holds an expert."""
        return bool(_llama()._lib.llama_expert_cache_flip_byte(self._model, layer))

    def last_error(self) -> str:
        """The last failed read of an expert; empty if there was none."""
        text: bytes = _llama()._lib.llama_expert_cache_last_error(self._model)
        return text.decode(errors="replace")

    @contextmanager
    def session(
        self, *, n_ctx: int = 512, n_batch: int = 512, n_ubatch: int = 512, n_threads: int | None = None
    ) -> Iterator[Session]:
        """A context on this model. Several may exist at once; they share the expert cache.

        Parameters
        ----------
        n_ctx
            Most tokens, prompt included.
        n_batch, n_ubatch
            Most tokens given to one call and computed at once. Results depend on the shape of ubatches.
        n_threads
            By default `default_threads()`.

        Raises RemoeError if it cannot be made, also where "auto" finds less memory than the cache needs.
        """
        llama = _llama()
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = n_ctx, n_batch, n_ubatch
        parameters.n_threads = parameters.n_threads_batch = n_threads or default_threads()
        _log.clear()
        context = llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise RemoeError(f"{self.path}: {_log.reason('a context could not be made')}")
        try:
            yield Session(self, context)
        finally:
            llama.llama_free(context)


class Session(Model):
    """A model with a context: tokens go in, logits come out."""

    def __init__(self, model: Model, context: Any) -> None:
        super().__init__(model.path, model._model, repack=model._repack)
        self._context = context
        # llama.cpp makes it smaller than asked for where the context is.
        self._n_batch: int = _llama().llama_n_batch(context)
        self._n_outputs = 0
        self._stop_callback: Any = None
        self.n_ctx: int = _llama().llama_n_ctx(context)

    def decode(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        """Evaluate tokens after those already there; logits of the last token, or of each, become readable.

        Raises RuntimeReadError if an expert could not be read, RemoeError if the context is full. `all_logits` takes at
        most n_batch tokens.
        """
        if all_logits and len(tokens) > self._n_batch:
            raise ValueError(f"{len(tokens)} tokens do not fit into a batch of {self._n_batch}")
        for start in range(0, len(tokens), self._n_batch):
            self._decode_batch(tokens[start : start + self._n_batch], all_logits)

    def _decode_batch(self, tokens: Sequence[int], all_logits: bool) -> None:
        count = len(tokens)
        # The batch keeps an address only: the array has to live until the evaluation is over.
        ids = (ctypes.c_int32 * count)(*tokens)
        batch = _llama().llama_batch_get_one(ids, count)
        if all_logits:
            batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        _log.clear()
        status = _llama().llama_decode(self._context, batch)
        if status == 2:
            raise DecodingStoppedError("the evaluation was stopped")
        if status == 1:
            raise RemoeError(f"{self.path}: the context of {self.n_ctx} tokens is full; choose a larger one")
        if status != 0:
            reason = self.last_error() or _log.reason("no reason was given")
            raise RuntimeReadError(f"decoding failed with status {status}: {reason}")
        self._n_outputs = count if all_logits else 1

    def all_logits(self) -> Logits:
        """Logits of the last `decode`, [tokens, n_vocab], or [1, n_vocab] without `all_logits`."""
        data = _llama().llama_get_logits(self._context)
        values: Logits = np.ctypeslib.as_array(data, (self._n_outputs, self.n_vocab)).copy()
        return values

    def logits(self) -> Logits:
        """Logits of the last token, [n_vocab]."""
        last: Logits = self.all_logits()[-1]
        return last

    def generate(self, n: int, *, temp: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Iterator[int]:
        """Choose and evaluate `n` tokens after a `decode`, each given before it is evaluated, the last one not at all.

        The most likely one with `temp` 0, else drawn at that temperature from the smallest set of tokens whose
        probability is at least `top_p`.
        """
        llama = _llama()
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if temp <= 0:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
        else:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(top_p, 1))
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(temp))
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        try:
            for index in range(n):
                token: int = llama.llama_sampler_sample(chain, self._context, -1)
                yield token
                if index + 1 < n:
                    self.decode([token])
        finally:
            llama.llama_sampler_free(chain)

    def score(self, tokens: Sequence[int], *, batch: int = 1) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of each token but the first, given those before it: nats, [len(tokens) - 1].

        Starts from an empty context. `batch` tokens are evaluated per call: with 1 as in a generation, so that the
        expert cache is asked as it is there (`stats()` after a `reset_stats()` says what it did). The last token is not
        evaluated.

        Raises RuntimeReadError if an expert could not be read, RemoeError if the tokens do not fit into the context.
        """
        if not 1 <= batch <= self._n_batch:
            raise ValueError(f"batches of {batch} tokens are not within 1 to {self._n_batch}")
        if len(tokens) - 1 > self.n_ctx:
            raise RemoeError(f"{self.path}: {len(tokens)} tokens do not fit into a context of {self.n_ctx}")
        self.clear()
        losses = np.empty(max(len(tokens) - 1, 0))
        for start in range(0, len(losses), batch):
            end = min(start + batch, len(losses))
            self.decode(tokens[start:end], all_logits=True)
            logits = self.all_logits().astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(end - start), tokens[start + 1 : end + 1]]
            losses[start:end] = np.log(np.exp(logits).sum(axis=1)) - chosen
        return losses

    def clear(self) -> None:
        """Forget all tokens. What the expert cache holds stays."""
        _llama().llama_memory_clear(_llama().llama_get_memory(self._context), True)

    @property
    def n_past(self) -> int:
        """Tokens that are there. After an evaluation that failed or was stopped: those whose ubatch was complete."""
        llama = _llama()
        return int(llama.llama_memory_seq_pos_max(llama.llama_get_memory(self._context), 0)) + 1

    def keep(self, n: int) -> int:
        """Forget all but the first `n` tokens, so that others can follow them. Returns how many are left.

        None are if the memory cannot be cut there: recurrent layers, or a sliding window that has left the beginning.
        """
        llama = _llama()
        if n < self.n_past:
            memory = llama.llama_get_memory(self._context)
            if llama.llama_memory_seq_pos_min(memory, 0) > 0 or not llama.llama_memory_seq_rm(memory, 0, n, -1):
                self.clear()
        return self.n_past

    def stop_when(self, wanted: Callable[[], bool] | None) -> None:
        """Ask `wanted` before every operation of an evaluation and end it, with DecodingStoppedError, once it says so.

        Meant for long prompts: asking costs a microsecond per operation. None takes it back.
        """
        kind = _llama().ggml_abort_callback
        # The library keeps the pointer. A null pointer asks nobody.
        self._stop_callback = kind(lambda _: wanted()) if wanted else kind()
        _llama().llama_set_abort_callback(self._context, self._stop_callback, None)

    def trace_start(self, path: Path, *, probs: bool = False) -> None:
        """Record which experts each layer chooses; `path` appears at `trace_stop`, or when the session ends.

        With `probs` also what the router gave each of them, before weights are normalised and scaled: its softmax or
        sigmoid over all experts, in gpt-oss the softmax over the chosen ones.
        """
        _log.clear()
        if not _llama()._lib.llama_expert_trace_start(self._context, os.fsencode(path), probs):
            raise RemoeError(f"{path}: {_log.reason('the recording could not be started')}")

    def trace_stop(self) -> None:
        _log.clear()
        if not _llama()._lib.llama_expert_trace_stop(self._context):
            raise RemoeError(f"the routing trace was not written: {_log.reason('no reason was given')}")


@contextmanager
def load_model(
    path: Path,
    cache: CacheConfig | None = None,
    *,
    mmap: bool = True,
    repack: bool = True,
    gpu_layers: int | str = 0,
    verbose: bool = False,
) -> Iterator[Model]:
    """Load a GGUF; freed when the context ends.

    Parameters
    ----------
    cache
        By default without expert cache, as stock llama.cpp.
    mmap
        Map the file instead of reading all of it; the expert cache reads dense weights in any case.
    repack
        Let llama.cpp rearrange weights for this CPU's kernels; of experts in the cache see `CacheConfig`.
    gpu_layers
        As in `layers_on_gpu`. The expert cache takes all or none.
    verbose
        Show llama.cpp's log on stderr.

    Raises RemoeError if the runtime is missing, for what `check_runnable` and `layers_on_gpu` refuse, or if the model
    cannot be loaded, with llama.cpp's reason. Where llama.cpp aborts after that, the process ends with a sentence and
    status 1.
    """
    llama = _llama()
    if not path.exists():
        raise RemoeError(f"{path}: no such file")
    check_runnable(path)
    _aborts.install(llama._lib, path)
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = layers_on_gpu(gpu_layers, gpu_devices())
    parameters.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mmap else llama.LLAMA_LOAD_MODE_NONE
    parameters.use_extra_bufts = repack
    overrides = _overrides(cache or CacheConfig("off"))
    parameters.kv_overrides = overrides
    _log.verbose = verbose
    _log.clear()
    handle = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not handle:
        raise RemoeError(f"{path}: {_log.reason('the model could not be loaded')}")
    try:
        yield Model(path, handle, repack=repack, gpu_layers=parameters.n_gpu_layers)
    finally:
        llama.llama_model_free(handle)


def gpu_devices() -> list[Device]:
    """The GPUs that the runtime can use. Raises RemoeError if the runtime is missing."""
    return find_devices(_llama()._lib)


@contextmanager
def open_model(
    path: Path,
    cache: CacheConfig | None = None,
    *,
    n_ctx: int = 512,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    mmap: bool = True,
    repack: bool = True,
    verbose: bool = False,
) -> Iterator[Session]:
    """`load_model` and a session on it, in one."""
    with (
        load_model(path, cache, mmap=mmap, repack=repack, verbose=verbose) as model,
        model.session(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=n_threads) as session,
    ):
        yield session


def _value(field: Any) -> Any:
    return field.decode() if isinstance(field, bytes) else field


def cache_overrides(config: CacheConfig) -> dict[str, str | int | float]:
    """The key-value overrides by which the runtime takes a configuration; budget "off" is one, too."""
    values: dict[str, str | int | float | None] = {
        "expert_cache.budget": config.budget,
        "expert_cache.policy": config.policy,
        "expert_cache.io": config.io,
        "expert_cache.threads": config.threads,
        "expert_cache.prefetch": config.prefetch,
        "expert_cache.repack": config.repack,
        "expert_cache.route_bias": config.route_bias,
        "expert_cache.route_keep": config.route_keep,
        "expert_cache.verify": None if config.verify is None else "on" if config.verify else "off",
        "expert_cache.warm": config.warm,
    }
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if len(str(value).encode()) > 127:
            raise RemoeError(f"{key}: {str(value)[:40]!r}... is too long")
    return given


def _overrides(config: CacheConfig) -> Any:
    """The overrides as the C API takes them, closed by an empty key."""
    llama = _llama()
    given = cache_overrides(config)
    overrides = (llama.llama_model_kv_override * (len(given) + 1))()
    for entry, (key, value) in zip(overrides, given.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return overrides


@contextmanager
def collected_log(*, verbose: bool) -> Iterator[Callable[[str], str]]:
    """While other code loads a model: gives a function that returns the reason in llama.cpp's log, or its argument.

    `verbose`, whether the log is also shown on stderr, stays in force.
    """
    _llama()
    _log.verbose = verbose
    _log.clear()
    yield _log.reason


def default_threads() -> int:
    """Physical cores this process may run on: a second thread on one core slows the kernels down."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = str(cpu)
        with suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        cores.add(siblings)
    return len(cores)


def system_info() -> str:
    """CPU features that the runtime's kernels use, as llama.cpp prints them."""
    text: bytes = _llama().llama_print_system_info()
    return text.decode(errors="replace").strip()
