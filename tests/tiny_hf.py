"""Small Hugging Face checkpoints with random weights, one per architecture of Mixture-of-Experts models.

Weights are of healthy size, so that routing varies from token to token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ARCHITECTURES = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral")

EXPERTS = 8
TOP_K = 2
LAYERS = 2
"""With experts; the models of DeepSeek have a dense one before them."""

_HIDDEN = 64
_SHARED: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
}
_MLA: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_hidden_layers": LAYERS + 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_QWEN: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
}
_SIZES: dict[str, dict[str, Any]] = {
    # llama.cpp takes no grouped-query attention here; released models have none.
    "olmoe": {"num_experts": EXPERTS, "num_hidden_layers": LAYERS, "intermediate_size": 64, "num_key_value_heads": 4},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_MLA, "q_lora_rank": 32, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 64,
        "head_dim": 16,
        "sliding_window": 16,
    },
    "mixtral": {"num_local_experts": EXPERTS, "num_hidden_layers": LAYERS, "intermediate_size": 64},
}
_ROUTER_GAIN = 2.0
_TEXT = [
    "The router of a Mixture-of-Experts model chooses a few experts for each token of the text.",
    "Neighbouring tokens that reuse the same experts are cheap, because nothing has to be read for them.",
    "Every layer has a router of its own, and 12 experts or 128, of which 2 or 8 compute.",
]


def tiny_model(arch: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a model of `arch` with LAYERS routers and its tokenizer in `folder`, and return that.

    `changes` go to `save_pretrained`: max_shard_size="100KB" makes many files and an index.
    """
    tokenizer = byte_level_tokenizer()
    config = transformers.AutoConfig.for_model(
        arch,
        **{
            **_SHARED,
            **_SIZES[arch],
            "vocab_size": tokenizer.get_vocab_size(),
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model)
    model.save_pretrained(folder, **changes)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind of tokenizer, with every byte and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        router = ".gate.weight" in name or "router.weight" in name
        if name.endswith("e_score_correction_bias") or "bias" in name or "sinks" in name:
            value.normal_(std=0.1)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            value.normal_()
        else:
            value.normal_(std=(_ROUTER_GAIN if router else 1.0) / math.sqrt(value.shape[-1]))
