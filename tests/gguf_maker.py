"""Small GGUF and safetensors files for tests: well-formed ones by the usual writers, malformed ones by hand."""

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

HIDDEN = 32
EXPERTS = 16
ROUTER = "blk.{}.ffn_gate_inp.weight"
HF_ROUTER = "model.layers.{}.mlp.gate.weight"

Values = npt.NDArray[np.float32]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + payload


def u32_field(key: str, value: int) -> bytes:
    return field(key, GGUFValueType.UINT32, struct.pack("<I", value))


def array_field(key: str, item_type: int, count: int, payload: bytes) -> bytes:
    return field(key, GGUFValueType.ARRAY, struct.pack("<IQ", item_type, count) + payload)


def tensor(name: str | bytes, shape: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def gguf(
    fields: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF of these metadata and tensor entries; `data` starts where the alignment says."""
    fields, tensors = fields or [], tensors or []
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields + tensors)
    return header + b"\0" * (-len(header) % alignment) + data


def random_values(seed: int, *shape: int) -> Values:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_base(
    path: Path,
    *,
    layers: int = 3,
    router_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    router_bias: bool = False,
    selection_bias: bool = False,
    metadata: dict[str, str | int] | None = None,
    tensors_per_part: int = 0,
    alignment: int = 32,
) -> Path:
    """A GGUF with the tensors of a Mixture-of-Experts model; returns its (first) file.

    Not a model that runs: its tensors are few and small, with odd sizes so that padding matters.
    """
    writer = GGUFWriter(path, "qwen3moe", split_max_tensors=tensors_per_part)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, value in {"general.name": "Tiny", "qwen3moe.block_count": layers, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(100)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(100)])
    writer.add_tensor("token_embd.weight", random_values(1, 7, HIDDEN))
    for layer in range(layers):
        experts = quantize(random_values(10 + layer, EXPERTS * 3, HIDDEN), GGMLQuantizationType.Q4_0)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", random_values(20 + layer, 5))
        router = quantize(random_values(30 + layer, EXPERTS, HIDDEN), router_type)
        writer.add_tensor(ROUTER.format(layer), router, raw_dtype=router_type)
        writer.add_tensor(
            f"blk.{layer}.ffn_down_exps.weight",
            experts.reshape(EXPERTS, 3, -1),
            raw_dtype=GGMLQuantizationType.Q4_0,
        )
        if router_bias:
            writer.add_tensor(f"blk.{layer}.ffn_gate_inp.bias", random_values(40 + layer, EXPERTS))
        if selection_bias:
            writer.add_tensor(f"blk.{layer}.exp_probs_b.bias", random_values(50 + layer, EXPERTS))
    writer.add_tensor("output_norm.weight", random_values(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not tensors_per_part:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def write_experts(path: Path, rows: list[int], *, experts: int = 4, alignment: int = 32, parts: int = 1) -> list[Path]:
    """A model of one expert tensor a layer, whose slices have `rows` rows of 32 F32 (128 bytes); its files."""
    # The writer puts the key into the first part only, but pads all of them.
    assert alignment == 32 or parts == 1
    writer = GGUFWriter(path, "qwen3moe", split_max_tensors=-(-2 * len(rows) // parts) if parts > 1 else 0)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for layer, count in enumerate(rows):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", random_values(20 + layer, 5))
        writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", random_values(layer, experts, count, HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) or [path]


def router_values(layers: int = 3) -> dict[str, Values]:
    """New router weights under Hugging Face names."""
    return {HF_ROUTER.format(layer): random_values(100 + layer, EXPERTS, HIDDEN) for layer in range(layers)}


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of tensors given as (dtype, shape, data)."""
    header, data = {}, b""
    for key, (dtype, shape, content) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def write_router(path: Path, tensors: dict[str, Values], dtype: str = "F32") -> Path:
    """A safetensors file; for BF16 the values are cut to their upper halves."""
    encode = {
        "F32": lambda values: values.astype("<f4").tobytes(),
        "F16": lambda values: values.astype("<f2").tobytes(),
        "BF16": lambda values: (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(),
        "F64": lambda values: values.astype("<f8").tobytes(),
    }[dtype]
    path.write_bytes(safetensors({key: (dtype, values.shape, encode(values)) for key, values in tensors.items()}))
    return path
