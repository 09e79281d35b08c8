"""What a model takes in memory beside its experts, from its metadata alone.

Dense weights are exact. The KV cache is what llama.cpp allocates for one sequence in 16-bit floats with full-size
sliding windows (llama-kv-cache.cpp); an architecture that keeps less is overestimated. The compute buffers are an
estimate, fitted to llama.cpp's own report for the architectures in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import Layout, Tensor, align

N_UBATCH = 512
"""Most tokens that llama.cpp computes at once, unless told otherwise."""

_CONTEXT_STEP = 256
_KV_BYTES = 2
_KEYS = re.compile(r"blk\.([0-9]+)\.attn_(?:k|qkv|kv_a_mqa)\.weight")


@dataclass(frozen=True)
class Footprint:
    """Bytes in memory beside the expert cache.

    Attributes
    ----------
    dense
        Weights that are not experts'.
    kv
        KV cache of the context.
    compute
        Buffers for intermediate results, estimated.
    read
        Of the dense weights, what computing one token reads: of the embeddings it is one row, unless the output matrix
        is the same.
    """

    dense: int
    kv: int
    compute: int
    read: int

    @property
    def total(self) -> int:
        return self.dense + self.kv + self.compute


def footprint(layouts: Sequence[Layout], n_ctx: int) -> Footprint:
    """Of a model with a context of ``n_ctx`` tokens. Raises RemoeError if its metadata lacks what that needs."""
    tensors = {tensor.name: tensor for layout in layouts for tensor in layout.tensors.values() if not tensor.experts}
    dense = sum(tensor.nbytes for tensor in tensors.values())
    embedding = tensors.get("token_embd.weight")
    unread = embedding.nbytes if embedding and "output.weight" in tensors else 0
    n_ctx = align(n_ctx, _CONTEXT_STEP)
    return Footprint(dense, _kv(layouts[0], tensors, n_ctx), _compute(layouts, tensors, n_ctx), dense - unread)


def _kv(layout: Layout, tensors: dict[str, Tensor], n_ctx: int) -> int:
    # Blocks without keys (recurrent ones) keep a state that does not grow with the context.
    blocks = sorted({int(match[1]) for name in tensors if (match := _KEYS.fullmatch(name))})
    if not blocks:
        return 0
    count = blocks[-1] + 1
    heads = _needed(layout, "attention.head_count", count)
    kv_heads = _per_block(layout, "attention.head_count_kv", count) or heads
    width = _needed(layout, "embedding_length", 1)[0]
    default = width // max(1, heads[0])
    keys = _per_block(layout, "attention.key_length", count) or [default] * count
    # With multi-head latent attention (DeepSeek) values are a part of the keys.
    latent = _per_block(layout, "attention.key_length_mla", count) is not None
    values = [0] * count if latent else _per_block(layout, "attention.value_length", count) or [default] * count
    return n_ctx * _KV_BYTES * sum(kv_heads[block] * (keys[block] + values[block]) for block in blocks)


def _compute(layouts: Sequence[Layout], tensors: dict[str, Tensor], n_ctx: int) -> int:
    """For a ubatch of prompt: the largest of logits, attention and experts, and the attention mask."""
    layout = layouts[0]
    width = _needed(layout, "embedding_length", 1)[0]
    used = max(_per_block(layout, "expert_used_count", 1) or [0])
    experts = [tensor for each in layouts for tensor in each.tensors.values() if tensor.experts]
    inner = max((tensor.shape[0] for tensor in experts if "ffn_down" in tensor.name), default=0)
    output = tensors.get("output.weight") or tensors.get("token_embd.weight")
    vocabulary = output.shape[-1] if output else 0
    floats = max(vocabulary + 3 * width, 10 * width, used * 3 * inner + 3 * width, used * 2 * width + width)
    masks = 2 if _per_block(layout, "attention.sliding_window", 1) else 1
    return N_UBATCH * (4 * floats + masks * 2 * n_ctx)


def _per_block(layout: Layout, key: str, count: int) -> list[int] | None:
    return layout.integers(f"{layout.text('general.architecture')}.{key}", count)


def _needed(layout: Layout, key: str, count: int) -> list[int]:
    values = _per_block(layout, key, count)
    if values is None:
        name = f"{layout.text('general.architecture')}.{key}"
        raise RemoeError(f"{layout.path}: has no key '{name}', so the memory it needs cannot be told")
    return values
