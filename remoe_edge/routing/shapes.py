"""The tensors and metadata that llama.cpp expects of a MoE architecture, for models that are written from scratch."""

from collections.abc import Iterator
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.stream import Value

ARCHITECTURES = ("olmoe", "qwen3moe", "qwen2moe", "deepseek2", "gpt-oss")

_RMS_EPSILON = 1e-6
_ROPE_BASE = 10000.0
_GPT_OSS_WINDOW = 128


@dataclass(frozen=True)
class Spec:
    """One tensor: its name, its shape in GGUF order (row length first), and what it is for.

    Roles: "embedding", "output", "norm", "bias", "sinks", "router", "selection_bias", and of matrices "q", "k", "v",
    "o", "gate", "up", "down" ("gate_up" where they are fused), "kv" for the compressing matrix of MLA. ``layer`` counts
    MoE layers; it is None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether the tensor holds one matrix per expert."""
        return len(self.shape) == 3 and "_exps" in self.name


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. ``layers`` are MoE layers; ``dense_blocks`` blocks without experts come before them."""

    arch: str
    hidden: int
    ff: int
    layers: int
    experts: int
    top_k: int
    vocabulary: int
    context: int
    dense_blocks: int = 0
    fused: bool = False
    """gate and up are one tensor (deepseek2)."""
    selection_bias: bool = False
    """A bias takes part in the choice of experts, but not in their weights (deepseek2)."""

    @property
    def blocks(self) -> int:
        return self.dense_blocks + self.layers

    @property
    def head_size(self) -> int:
        return 128 if self.hidden % 128 == 0 and self.arch != "gpt-oss" else 64

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size

    @property
    def kv_heads(self) -> int:
        """A quarter of the heads where the architecture shares them and their number allows it."""
        return self.heads // 4 if self.arch in ("qwen3moe", "gpt-oss") and self.heads % 4 == 0 else self.heads

    # MLA of deepseek2: DeepSeek-V2-Lite has a latent of 512, and heads of 64 with and 128 without positions.
    @property
    def latent(self) -> int:
        return max(64, self.hidden // 4)

    @property
    def rope_size(self) -> int:
        return 64 if self.arch == "deepseek2" else self.head_size

    def check(self) -> None:
        """Raise RemoeError if no model of this architecture can have these sizes."""
        if self.hidden % 64 or self.ff % 32:
            raise RemoeError(
                f"hidden size {self.hidden} and expert size {self.ff} do not fit {self.arch}: "
                "they must be multiples of 64 and of 32"
            )
        if min(self.hidden, self.ff, self.blocks) < 1:
            raise RemoeError("hidden size, expert size and number of layers must be positive")


def tensors(shape: ModelShape) -> Iterator[Spec]:
    """All tensors of a model, in the order in which they lie in its file."""
    hidden = shape.hidden
    yield Spec("token_embd.weight", (hidden, shape.vocabulary), "embedding")
    yield Spec("output_norm.weight", (hidden,), "norm")
    yield Spec("output.weight", (hidden, shape.vocabulary), "output")
    for block in range(shape.blocks):
        yield Spec(f"blk.{block}.attn_norm.weight", (hidden,), "norm")
        yield from _mla(shape, block) if shape.arch == "deepseek2" else _attention(shape, block)
        norm = "post_attention_norm" if shape.arch == "gpt-oss" else "ffn_norm"
        yield Spec(f"blk.{block}.{norm}.weight", (hidden,), "norm")
        if block < shape.dense_blocks:
            yield from _ffn(f"blk.{block}.ffn_{{}}.weight", hidden, shape.ff)
        else:
            yield from _experts(shape, block)


def metadata(shape: ModelShape) -> dict[str, Value]:
    """The keys that describe the model's shape to llama.cpp."""
    keys: dict[str, Value] = {
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.blocks,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": _RMS_EPSILON,
        "rope.freq_base": _ROPE_BASE,
        "rope.dimension_count": shape.rope_size,
        "vocab_size": shape.vocabulary,
    }
    if shape.experts:
        keys["expert_count"] = shape.experts
        keys["expert_used_count"] = shape.top_k
        keys["expert_feed_forward_length"] = shape.ff
    if shape.arch == "deepseek2":
        keys["leading_dense_block_count"] = shape.dense_blocks
        keys["attention.head_count_kv"] = 1
        keys["attention.q_lora_rank"] = 0
        keys["attention.kv_lora_rank"] = shape.latent
        keys["attention.key_length"] = shape.latent + shape.rope_size
        keys["attention.value_length"] = shape.latent
        keys["attention.key_length_mla"] = shape.head_size + shape.rope_size
        keys["attention.value_length_mla"] = shape.head_size
        keys["expert_shared_count"] = 1
        keys["expert_gating_func"] = 2 if shape.selection_bias else 1
        keys["expert_weights_norm"] = shape.selection_bias
        keys["expert_weights_scale"] = 1.0
    else:
        keys["attention.key_length"] = shape.head_size
        keys["attention.value_length"] = shape.head_size
    if shape.arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = shape.ff
    if shape.arch == "gpt-oss":
        keys["attention.sliding_window"] = _GPT_OSS_WINDOW
    return {f"{shape.arch}.{key}": value for key, value in keys.items()}


def _attention(shape: ModelShape, block: int) -> Iterator[Spec]:
    q_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    prefix = f"blk.{block}.attn_"
    for role, size in ("q", q_size), ("k", kv_size), ("v", kv_size):
        yield Spec(f"{prefix}{role}.weight", (shape.hidden, size), role)
        if shape.arch in ("qwen2moe", "gpt-oss"):
            yield Spec(f"{prefix}{role}.bias", (size,), "bias")
    yield Spec(f"{prefix}output.weight", (q_size, shape.hidden), "o")
    if shape.arch == "gpt-oss":
        yield Spec(f"{prefix}output.bias", (shape.hidden,), "bias")
        yield Spec(f"{prefix}sinks.weight", (shape.heads,), "sinks")
    if shape.arch == "olmoe":
        yield Spec(f"{prefix}q_norm.weight", (q_size,), "norm")
        yield Spec(f"{prefix}k_norm.weight", (kv_size,), "norm")
    if shape.arch == "qwen3moe":
        yield Spec(f"{prefix}q_norm.weight", (shape.head_size,), "norm")
        yield Spec(f"{prefix}k_norm.weight", (shape.head_size,), "norm")


def _mla(shape: ModelShape, block: int) -> Iterator[Spec]:
    prefix, heads, head = f"blk.{block}.attn_", shape.heads, shape.head_size
    yield Spec(f"{prefix}q.weight", (shape.hidden, heads * (head + shape.rope_size)), "q")
    yield Spec(f"{prefix}kv_a_mqa.weight", (shape.hidden, shape.latent + shape.rope_size), "kv")
    yield Spec(f"{prefix}kv_a_norm.weight", (shape.latent,), "norm")
    yield Spec(f"{prefix}k_b.weight", (head, shape.latent, heads), "k")
    yield Spec(f"{prefix}v_b.weight", (shape.latent, head, heads), "v")
    yield Spec(f"{prefix}output.weight", (heads * head, shape.hidden), "o")


def _ffn(name: str, hidden: int, ff: int, *experts: int) -> Iterator[Spec]:
    yield Spec(name.format("gate"), (hidden, ff, *experts), "gate")
    yield Spec(name.format("up"), (hidden, ff, *experts), "up")
    yield Spec(name.format("down"), (ff, hidden, *experts), "down")


def _experts(shape: ModelShape, block: int) -> Iterator[Spec]:
    prefix, hidden, ff, experts = f"blk.{block}.ffn_", shape.hidden, shape.ff, shape.experts
    layer = block - shape.dense_blocks
    yield Spec(f"{prefix}gate_inp.weight", (hidden, experts), "router", layer)
    if shape.arch == "gpt-oss":
        yield Spec(f"{prefix}gate_inp.bias", (experts,), "bias", layer)
    if shape.selection_bias:
        yield Spec(f"blk.{block}.exp_probs_b.bias", (experts,), "selection_bias", layer)
    if shape.fused:
        yield Spec(f"{prefix}gate_up_exps.weight", (hidden, 2 * ff, experts), "gate_up", layer)
        yield Spec(f"{prefix}down_exps.weight", (ff, hidden, experts), "down", layer)
    else:
        yield from _ffn(f"{prefix}{{}}_exps.weight", hidden, ff, experts)
    if shape.arch == "gpt-oss":
        for matrix, size in ("gate", ff), ("up", ff), ("down", hidden):
            yield Spec(f"{prefix}{matrix}_exps.bias", (size, experts), "bias", layer)
    if shape.arch == "qwen2moe":
        yield Spec(f"{prefix}gate_inp_shexp.weight", (hidden,), "bias", layer)
    if shape.arch in ("qwen2moe", "deepseek2"):
        yield from _ffn(f"{prefix}{{}}_shexp.weight", hidden, ff)
