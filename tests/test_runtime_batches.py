"""Ways to use a context other than one sequence growing at its end: equal to the bit with the cache, as without it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from remoe_edge.runtime.llama import CacheConfig, Logits, load_model

pytestmark = pytest.mark.runtime

N_EXPERT, K = 16, 3
CONFIGS = [CacheConfig(f"{slots}s", prefetch=prefetch) for slots in (K, 6, N_EXPERT) for prefetch in ("off", "router")]


@pytest.fixture(scope="module", params=["qwen3moe", "deepseek2", "gpt-oss"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, request.param, quant="Q4_0", n_expert=N_EXPERT, k=K, seed=11)
    return path


class Context:
    """A context of llama-cpp-python's C API, with several sequences."""

    def __init__(self, model: Any, **parameters: Any) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.model = model
        values = llama_cpp.llama_context_default_params()
        values.n_ctx, values.n_batch, values.n_ubatch, values.n_threads, values.n_threads_batch = 512, 128, 64, 2, 2
        values.n_seq_max, values.kv_unified = 4, True
        for name, value in parameters.items():
            setattr(values, name, value)
        self.handle = llama_cpp.llama_init_from_model(model._model, values)
        assert self.handle

    def decode(self, tokens: list[tuple[int, int, int]]) -> Logits:
        """Evaluate (token, position, sequence) in one batch; logits of all, [tokens, n_vocab]."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
            assert self.api.llama_decode(self.handle, batch) == 0
            rows = self.api.llama_get_logits(self.handle)
            return np.ctypeslib.as_array(rows, (len(tokens), self.model.n_vocab)).copy()
        finally:
            self.api.llama_batch_free(batch)

    def close(self) -> None:
        self.api.llama_free(self.handle)


def several_sequences(model: Any) -> Logits:
    """Three sequences that start at different times and go on together, one of them from a copy of another."""
    context = Context(model)
    rows = [context.decode([(5 + i, i, 0) for i in range(9)] + [(40 - i, i, 1) for i in range(6)])]
    context.api.llama_memory_seq_cp(context.api.llama_get_memory(context.handle), 0, 2, -1, -1)
    for step in range(8):
        best = [int(row.argmax()) for row in rows[-1][-3:]] if step else [7, 8, 9]
        rows.append(context.decode([(best[0], 9 + step, 0), (best[1], 6 + step, 1), (best[2] + 1, 9 + step, 2)]))
    context.close()
    return np.concatenate(rows)


def context_shift(model: Any) -> Logits:
    """The oldest tokens go and the others take their places, as llama.cpp's tools do when a context is full."""
    context = Context(model)
    memory = context.api.llama_get_memory(context.handle)
    rows = [context.decode([(5 + i % 50, i, 0) for i in range(60)])]
    if context.api.llama_memory_can_shift(memory):
        assert context.api.llama_memory_seq_rm(memory, 0, 4, 24)
        context.api.llama_memory_seq_add(memory, 0, 24, 60, -20)
        position = 40
    else:
        position = 60
    for step in range(8):
        rows.append(context.decode([(int(rows[-1][-1].argmax()), position + step, 0)]))
    context.close()
    return np.concatenate(rows)


def rejected_drafts(model: Any) -> Logits:
    """What speculative decoding does to the main model: several drafted tokens at once, the wrong ones taken back."""
    context = Context(model)
    memory = context.api.llama_get_memory(context.handle)
    rows = [context.decode([(5 + i, i, 0) for i in range(12)])]
    position = 12
    for step in range(6):
        last = int(rows[-1][-1].argmax())
        rows.append(
            context.decode([(last, position, 0), *((20 + 3 * step + i, position + 1 + i, 0) for i in range(4))])
        )
        assert context.api.llama_memory_seq_rm(memory, 0, position + 2, -1)
        position += 2
    context.close()
    return np.concatenate(rows)


def embeddings(model: Any) -> Logits:
    """Mean of the last hidden states of a text."""
    import llama_cpp

    context = Context(model, embeddings=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
    batch = context.api.llama_batch_init(20, 0, 1)
    batch.n_tokens = 20
    for i in range(20):
        batch.token[i], batch.pos[i], batch.logits[i], batch.n_seq_id[i] = 5 + i, i, 1, 1
        batch.seq_id[i][0] = 0
    assert context.api.llama_decode(context.handle, batch) == 0
    context.api.llama_batch_free(batch)
    data = context.api.llama_get_embeddings_seq(context.handle, 0)
    n = context.api.llama_model_n_embd(model._model)
    values: Logits = np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (1, n)).copy()
    context.close()
    return values


@pytest.mark.parametrize("use", [several_sequences, context_shift, rejected_drafts, embeddings])
def test_equal_to_the_bit(model: Path, use: Callable[[Any], Logits]) -> None:
    with load_model(model, None, mmap=False, repack=False) as resident:
        reference = use(resident)
    assert np.isfinite(reference).all()
    assert len(np.unique(reference)) > 10
    for config in CONFIGS:
        with load_model(model, config, repack=False) as cached:
            logits = use(cached)
            stats = cached.stats()
        assert stats
        assert (stats.evictions > 0) == (config.budget != f"{N_EXPERT}s"), config
        assert logits.tobytes() == reference.tobytes(), config
