"""Small models with random weights that llama.cpp loads and runs: every architecture, type and layout the cache meets.

Weights are of healthy size, so that routing varies from token to token and a wrong byte changes the logits.
"""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import Keys

from remoe_edge.gguf_io.blocks import random_blocks
from remoe_edge.gguf_io.stream import NewTensor, Piece, write_gguf
from remoe_edge.routing.shapes import ModelShape, metadata, tensors
from remoe_edge.routing.twin import step_tokenizer, tensor_type

MOE_ARCHITECTURES = ("qwen3moe", "qwen2moe", "olmoe", "deepseek2", "gpt-oss")
DENSE_ARCHITECTURE = "llama"
UNKNOWN_ARCHITECTURE = "remoe-unknown"

STEPS = 64
VOCABULARY = 259 + STEPS

_ROUTER_GAIN = 2.0
_BIAS_RMS = 0.1


def write_tiny_model(
    path: Path,
    arch: str,
    quant: str = "F32",
    *,
    fused: bool = False,
    selection_bias: bool = False,
    n_expert: int = 16,
    k: int = 2,
    n_layer: int = 3,
    hidden: int = 256,
    ff: int = 256,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """Write a model with ``n_layer`` MoE layers (dense ones for DENSE_ARCHITECTURE) and return its path.

    deepseek2 has a dense block before them, and only there ``fused`` (one tensor for gate and up) and
    ``selection_bias`` (exp_probs_b) are possible. UNKNOWN_ARCHITECTURE does not load.
    """
    assert arch == "deepseek2" or not (fused or selection_bias)
    dense = arch == DENSE_ARCHITECTURE
    shape = ModelShape(
        arch=arch,
        hidden=hidden,
        ff=ff,
        layers=0 if dense else n_layer,
        experts=0 if dense else n_expert,
        top_k=0 if dense else k,
        vocabulary=VOCABULARY,
        context=4096,
        dense_blocks=n_layer if dense else int(arch == "deepseek2"),
        fused=fused,
        selection_bias=selection_bias,
    )
    specs = {spec.name: spec for spec in tensors(shape)}

    def data(tensor: NewTensor) -> Iterator[Piece]:
        spec = specs[tensor.name]
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        if spec.role == "norm":
            yield rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
            return
        if spec.role in ("bias", "selection_bias"):
            rms = _BIAS_RMS
        elif spec.role in ("embedding", "sinks"):
            rms = 1.0
        else:
            rms = (_ROUTER_GAIN if spec.role == "router" else 1.0) / math.sqrt(spec.shape[0])
        block_bytes = random_blocks(tensor.type, 1, rms, rng).shape[1]
        yield random_blocks(tensor.type, tensor.nbytes // block_bytes, rms, rng)

    template = {"tokenizer.chat_template": chat_template} if chat_template else {}
    write_gguf(
        path,
        arch,
        {"general.name": f"tiny {arch}", **metadata(shape), **step_tokenizer(STEPS), **template},
        [NewTensor(spec.name, spec.shape, tensor_type(spec, quant)) for spec in specs.values()],
        data,
    )
    return path


def split_model(path: Path, directory: Path, shards: int = 2) -> list[Path]:
    """Write a model again as ``shards`` files "<stem>-00001-of-0000N.gguf" in ``directory``; the first one opens it."""
    reader = GGUFReader(path)
    writer = GGUFWriter(
        None, reader.fields[Keys.General.ARCHITECTURE].contents(), split_max_tensors=-(-len(reader.tensors) // shards)
    )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != Keys.General.ARCHITECTURE:
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(directory / path.name)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob(f"{path.stem}-*-of-*.gguf"))
