"""Tiny Hugging Face models with random weights: one of every supported architecture, as transformers saves them.

Weights are larger than an initialisation makes them, and norms and biases are not constants: a tensor that is lost,
transposed or taken for another one changes what is computed, and routers choose clearly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
}
_MLA = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
_SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 64, "num_key_value_heads": 4}

# Expert widths are multiples of 32, where Q8_0 and Q4_0 end; hidden sizes and widths of 256 suit K-quants.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32, "num_experts": 16},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 16},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 16, "head_dim": 32, "norm_topk_prob": True},
    "deepseek_v2": {**_MLA, **_SHARED, "intermediate_size": 128, "n_routed_experts": 16},
    "deepseek_v3": {
        **_MLA,
        **_SHARED,
        "q_lora_rank": 32,
        "intermediate_size": 128,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {"intermediate_size": 64, "num_local_experts": 16, "head_dim": 32, "sliding_window": 16},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8},
}

# Regular expressions of pre-tokenizers, as in the tokenizer.json of the models named.
GPT2 = None
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

TEXT = """The keeper of the lighthouse counts the ships that pass, one by one, and writes them in a book.
In 1987 there were 12 of them on a single day; it's said that he'd never seen so many, and they'll not come again.
Grüße aus Köln: naïve café, Ærøskøbing, 東京は大きい, Привет мир, שלום, 🙂🚀.

def mean(values):
    total = 0.0
    for value in values:
        total += value  # sum them up
    return total / len(values)

"The tide is out," she said; "we can't wait for 3.1415 hours."   It doesn't rain -- not yet.
\tif (x != y && y >= 10) { return x[i] * 2; }
"""


def tiny_model(
    arch: str,
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: Any,
) -> PreTrainedModel:
    """Save a random model of an architecture, by its transformers name, with a tokenizer into `folder`; return it.

    `config` changes what `ARCHITECTURES` says, such as `num_hidden_layers` and `hidden_size`.
    """
    settings = {**_COMMON, **ARCHITECTURES[arch], **config}
    tokenizer = tiny_tokenizer(vocab=settings["vocab_size"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **{**ids, **settings})).to(dtype).eval()
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter and every buffer that is saved; activations keep a size near 1 through all layers."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    with torch.no_grad():
        for name, tensor in sorted(saved.items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(noise * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0))
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            else:
                # The contracted dimension: gpt_oss stores experts as [in, out], all others as [out, in].
                transposed = model.config.model_type == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj"))
                tensor.copy_(noise * tensor.shape[-2 if transposed else -1] ** -0.5)


def tiny_tokenizer(pattern: str | None = GPT2, *, vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` entries, trained on `TEXT`.

    It splits text with GPT-2's pattern, or with another one as Llama 3, Qwen and DeepSeek do. Three special tokens:
    <|endoftext|>, which begins and ends texts, <|user|> and <|assistant|>.
    """
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|user|>", "<|assistant|>")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=256
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; None removes one."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))
