"""The demo model that comes with the package: where its parts lie, and its GGUF.

A Hugging Face checkpoint of ours (`data/demo`, its README is the model card), the router that `remoe-edge tune` made of
it, and held-out text. The word `demo` stands for it wherever a command takes a model. Its GGUF is written here without
torch, so that a device needs none; it is the file that `remoe-edge convert` makes of the checkpoint (a test compares).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH, get_tensor_name_map
from gguf.constants import GGMLQuantizationType, LlamaFileType, TokenType

from remoe_edge.files import atomic_output, cache_dir
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.router import RouterTensor, read_safetensors
from remoe_edge.gguf_io.stream import NewTensor, Piece, Value, write_gguf
from remoe_edge.progress import Report, silent

WORD = "demo"
"""What names the demo model on the command line."""

TUNED_WORD = "demo-tuned"
"""The same model with its tuned router."""

_FOLDER = Path(__file__).parent / "data" / "demo"
_F32, _BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16


def demo_checkpoint() -> Path:
    """Folder of the Hugging Face checkpoint."""
    return _FOLDER / "model"


def demo_router(seed: int = 0) -> Path:
    """The tuned router, a safetensors file; seeds 0, 1 and 2 of the same command are there."""
    return _FOLDER / f"router-seed{seed}.safetensors"


def demo_texts() -> dict[str, Path]:
    """Held-out text by domain: neither the model nor its router was trained on it."""
    return {path.stem: path for path in sorted((_FOLDER / "held-out").glob("*.txt"))}


def demo_tuning_text() -> Path:
    """Text to tune the router on: neither training text of the model nor held-out text."""
    return _FOLDER / "tune.jsonl.gz"


def resolve(model: Path) -> Path:
    """`model`, or the GGUF that the words `demo` and `demo-tuned` stand for if there is no such file."""
    if model.exists() or str(model) not in (WORD, TUNED_WORD):
        return model
    return demo_gguf(tuned=str(model) == TUNED_WORD)


def demo_gguf(*, tuned: bool = False, report: Report = silent) -> Path:
    """The demo model as a GGUF, in BF16, in the cache folder; written if it is not there yet."""
    folder = cache_dir() / "demo" / _digest()
    folder.mkdir(parents=True, exist_ok=True)
    base, changed = folder / "demo.gguf", folder / "demo-tuned.gguf"
    if not base.exists():
        write_checkpoint(demo_checkpoint(), base, report)
    if tuned and not changed.exists():
        convert(base, demo_router(), changed, force=True)
    return changed if tuned else base


def _digest() -> str:
    digest = hashlib.sha256()
    for file in [*sorted(demo_checkpoint().iterdir()), demo_router()]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def write_checkpoint(folder: Path, output: Path, report: Report = silent) -> None:
    """Write a checkpoint of architecture olmoe as a GGUF: matrices as they are, norms and routers as F32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = _by_gguf_name(read_safetensors(folder / "model.safetensors"), config)
    tensors = [_new_tensor(name, parts) for name, parts in stored.items()]
    total = sum(tensor.nbytes for tensor in tensors)
    metadata = {**_metadata(config), **_tokenizer(folder)}
    with atomic_output(output, force=True) as temporary:
        write_gguf(
            temporary,
            "olmoe",
            metadata,
            tensors,
            lambda tensor: _data(tensor, stored[tensor.name]),
            lambda written: report("writing the demo model", written / total),
        )


def _by_gguf_name(tensors: dict[str, RouterTensor], config: dict[str, Any]) -> dict[str, list[RouterTensor]]:
    """The tensors of each GGUF tensor: one, or one for each expert."""
    names = get_tensor_name_map(MODEL_ARCH.OLMOE, config["num_hidden_layers"])
    stored: dict[str, list[RouterTensor]] = {}
    for block in range(config["num_hidden_layers"]):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            experts = f"model.layers.{block}.mlp.experts"
            name = names.get_name(f"{experts}.{matrix}")
            stored[f"{name}.weight"] = [
                tensors.pop(f"{experts}.{expert}.{matrix}.weight") for expert in range(config["num_experts"])
            ]
    for key, tensor in tensors.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        stored[name] = [tensor]
    return stored


def _new_tensor(name: str, parts: list[RouterTensor]) -> NewTensor:
    shape = parts[0].shape[::-1] + ((len(parts),) if len(parts) > 1 else ())
    # What llama.cpp's converter does: vectors and routers are F32.
    return NewTensor(name, shape, _F32 if len(shape) == 1 or "ffn_gate_inp" in name else _BF16)


def _data(tensor: NewTensor, parts: list[RouterTensor]) -> Iterator[Piece]:
    for part in parts:
        values = part.load()
        # The stored numbers are BF16: their upper halves are all there is.
        yield values if tensor.type == _F32 else (values.view("<u4") >> 16).astype("<u2")


def _metadata(config: dict[str, Any]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }
    return {
        "general.type": "model",
        "general.name": "remoe-edge demo",
        "general.size_label": "32x3.1M",
        "general.license": "mit",
        "general.file_type": int(LlamaFileType.MOSTLY_BF16),
        "general.quantization_version": 2,
        **{f"olmoe.{key}": value for key, value in keys.items()},
    }


def _tokenizer(folder: Path) -> dict[str, Value]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if index in special else TokenType.NORMAL) for index in range(len(tokens))
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": min(special),
        "tokenizer.ggml.add_bos_token": False,
    }
