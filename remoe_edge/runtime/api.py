"""The Python API: llama-cpp-python's `Llama`, with its experts in a bounded cache. Reached as ``remoe_edge.Llama``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from remoe_edge.demo_model import resolve
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import has_experts
from remoe_edge.gguf_io.runnable import check_runnable
from remoe_edge.runtime.gpu import layers_on_gpu
from remoe_edge.runtime.llama import (
    CacheConfig,
    CacheInfo,
    CacheStats,
    Model,
    RuntimeReadError,
    cache_overrides,
    collected_log,
    default_threads,
    gpu_devices,
    require_runtime,
)

require_runtime()  # says what to do where the runtime is missing, before the next line fails without

import llama_cpp  # noqa: E402


class ModelLoadError(RemoeError, ValueError):
    """A model could not be loaded; a ValueError, too, because that is what llama-cpp-python raises."""


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` with an expert cache; all else is as llama-cpp-python documents it.

    ::

        with remoe_edge.Llama("model.gguf", n_ctx=2048, expert_cache="880MiB") as llm:
            print(llm("The capital of France is", max_tokens=8)["choices"][0]["text"])
            print(llm.cache_stats().hit_rate)

    Parameters
    ----------
    model_path
        A GGUF, or "demo" or "demo-tuned" for the packaged model.
    expert_cache
        Bytes ("880MiB", or a number), slots per layer ("16s"), "auto", or "off" for stock llama.cpp. "auto" is "off"
        for a model without experts.
    expert_cache_policy, expert_cache_io, expert_cache_threads, expert_cache_repack, expert_prefetch,
    expert_cache_verify, expert_cache_warm
        As in `CacheConfig`; named as the options of llama.cpp's tools. None leaves the choice to the runtime.
    n_gpu_layers
        As llama-cpp-python takes it; by default all where the runtime sees a GPU, else none.
    n_threads, n_threads_batch
        By default the physical cores.
    kv_overrides
        Kept. Keys "expert_cache.*" in it are the same settings; one that is given twice is refused.

    Raises ModelLoadError with llama.cpp's reason, for example a budget below the floor, and RuntimeReadError where an
    expert cannot be read; the object can be used on after that. Both are a RemoeError.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        expert_cache: str | int = "auto",
        expert_cache_policy: str | None = None,
        expert_cache_io: str | None = None,
        expert_cache_threads: int | str | None = None,
        expert_cache_repack: str | None = None,
        expert_prefetch: str | None = None,
        expert_cache_verify: bool | None = None,
        expert_cache_warm: str | os.PathLike[str] | None = None,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        path = resolve(Path(model_path))
        if not path.exists():
            raise ModelLoadError(f"{path}: no such file")
        try:
            check_runnable(path)
        except RemoeError as error:
            raise ModelLoadError(str(error)) from error
        config = CacheConfig(
            str(expert_cache),
            expert_cache_policy,
            expert_cache_io,
            expert_cache_threads,
            expert_prefetch,
            expert_cache_repack,
            verify=expert_cache_verify,
            warm=None if expert_cache_warm is None else os.fspath(expert_cache_warm),
        )
        kwargs.setdefault("n_gpu_layers", layers_on_gpu("auto", gpu_devices()))
        with _load_errors(path, verbose):
            super().__init__(
                str(path),
                kv_overrides=_merged(path, config, kv_overrides or {}),
                n_threads=n_threads or default_threads(),
                n_threads_batch=n_threads_batch or n_threads or default_threads(),
                verbose=verbose,
                **kwargs,
            )
        self._view: Any = Model(path, self._model.model, repack=True)

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, its context and its cache. May be called again."""
        # A constructor that failed early has left nothing to free.
        if hasattr(self, "_stack"):
            super().close()
        # llama-cpp-python would go on with null pointers.
        self._view = self._model = self._ctx = _Closed(getattr(self, "model_path", "the model"))

    def cache_info(self) -> CacheInfo | None:
        """What the expert cache decided, sizes in bytes; None without one."""
        info: CacheInfo | None = self._view.info()
        return info

    def cache_stats(self, layer: int | None = None) -> CacheStats | None:
        """Counters since load or the last reset, of one MoE layer, from 0, or of all; None without a cache."""
        stats: CacheStats | None = self._view.stats(layer)
        return stats

    def reset_cache_stats(self) -> None:
        """Start all counters at 0 again."""
        self._view.reset_stats()

    def eval(self, tokens: Sequence[int]) -> None:
        """As llama-cpp-python's; raises RuntimeReadError if an expert cannot be read."""
        with self._read_errors():
            super().eval(tokens)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As llama-cpp-python's; raises RuntimeReadError if an expert cannot be read."""
        with self._read_errors():
            return super().embed(*args, **kwargs)

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = self._view.last_error()
            if not reason or not str(error).endswith("returned -3"):
                raise
            raise RuntimeReadError(f"{error}: {reason}") from error


class _Closed:
    """Stands for what was freed: any use of it is an error instead of a crash."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        raise RemoeError(f"{self._path}: is closed; open it again to use it")


@contextmanager
def _load_errors(path: Path, verbose: bool) -> Iterator[None]:
    """llama-cpp-python says that a model or context could not be made; the log says why."""
    with collected_log(verbose=verbose) as reason:
        try:
            yield
        except ValueError as error:
            raise ModelLoadError(f"{path}: {reason(str(error))}") from error


def _merged(
    path: Path, config: CacheConfig, given: dict[str, bool | int | float | str]
) -> dict[str, bool | int | float | str]:
    """The caller's overrides and those that configure the cache."""
    chosen = cache_overrides(config)
    budget = "expert_cache.budget"
    if budget in given and config.budget == "auto":
        del chosen[budget]
    elif config.budget == "auto" and not has_experts(path):
        chosen[budget] = "off"
    if twice := sorted(chosen.keys() & given.keys()):
        raise RemoeError(f"{twice[0]} is given twice, in kv_overrides and as an argument; leave one of them out")
    merged = {**given, **chosen}
    useless = sorted(key for key in merged if key.startswith("expert_cache.") and key != budget)
    if merged[budget] == "off" and useless:
        raise RemoeError(f"{useless[0]} has no effect without an expert cache; leave it out")
    return merged
