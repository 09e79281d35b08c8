"""What a model says of itself, checked before llama.cpp gets the file.

llama.cpp refuses most bad files with a reason. On some it ends the process instead (GGML_ASSERT in llama-model.cpp and
llama-vocab.cpp, a null pointer in ggml-cpu.c), which takes a server, or a program that uses the Python API, with it.
Those are refused here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from gguf.constants import GGUFValueType

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import Layout, read_model

MAX_BLOCKS = 512
"""LLAMA_MAX_LAYERS of the pinned llama.cpp."""

MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS of the pinned llama.cpp."""

MAX_TOKENS = 1 << 22
"""Many times the largest vocabulary seen (262,144); bounds the memory that a hostile file costs."""

# Types without a product in ggml-cpu.c: llama.cpp calls a null pointer for a matrix of them.
_NO_MATRIX = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
# A table of experts by token (DeepSeek-V4), which is looked up.
_LOOKED_UP = "ffn_gate_tid2eid"
_TOKENS = "tokenizer.ggml.tokens"
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_BLOCK = re.compile(r"blk\.([0-9]+)\.")


def check_runnable(path: Path) -> list[Layout]:
    """Read one model as `read_model` does, and check what llama.cpp would abort on.

    Raises RemoeError, naming the file and the key, tensor or token at fault.
    """
    layouts = read_model(path)
    check_shape(layouts)
    _check_tokens(layouts[0])
    return layouts


def check_shape(layouts: Sequence[Layout]) -> None:
    """Check the numbers of blocks and experts in a model's metadata, and the names and types of its tensors.

    Raises RemoeError, naming the file and the key or tensor at fault.
    """
    layout = layouts[0]
    architecture = layout.text("general.architecture")
    if architecture is None:
        raise RemoeError(f"{layout.path}: has no key 'general.architecture', so it is no model; download it again")
    for each in layouts:
        for name, tensor in each.tensors.items():
            matrix = len(tensor.shape) > 1 and name.endswith(".weight") and _LOOKED_UP not in name
            if matrix and tensor.type.name in _NO_MATRIX:
                raise RemoeError(f"{each.path}: tensor '{name}' is of type {tensor.type.name}, which no matrix can be")
            if (match := _BLOCK.match(name)) and int(match[1]) >= MAX_BLOCKS:
                raise RemoeError(f"{each.path}: tensor '{name}' is of block {match[1]}, expected 0 to {MAX_BLOCKS - 1}")

    def limited(name: str, least: int, most: int) -> int | None:
        key = f"{architecture}.{name}"
        value = layout.integer(key)
        if value is not None and not least <= value <= most:
            raise _wrong(layout, key, value, least, most)
        return value

    blocks = limited("block_count", 1, MAX_BLOCKS) or MAX_BLOCKS
    limited("nextn_predict_layers", 0, blocks - 1)
    experts = limited("expert_count", 0, MAX_EXPERTS) or 0
    key = f"{architecture}.expert_used_count"
    used = layout.integers(key, 1) or []
    for value in used or [0]:
        if not 0 <= value <= experts:
            raise _wrong(layout, key, value, min(1, experts), experts)
    if experts and not any(used):
        raise _wrong(layout, key, 0 if used else None, 1, experts)
    groups = limited("expert_group_count", 0, max(0, experts - 1)) or 0
    if groups > 1:
        if experts % groups:
            raise RemoeError(
                f"{layout.path}: key '{architecture}.expert_group_count' is {groups}, which does not divide the "
                f"{experts} experts"
            )
        if limited("expert_group_used_count", 1, groups - 1) is None:
            raise _wrong(layout, f"{architecture}.expert_group_used_count", None, 1, groups - 1)
    for name in "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon":
        field = layout.fields.get(f"{architecture}.{name}")
        if field and type(field.value) is float and not 0 <= field.value < math.inf:
            raise RemoeError(f"{layout.path}: key '{field.key}' is {field.value}, expected a number from 0")
    scaling = layout.text(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALINGS:
        raise RemoeError(
            f"{layout.path}: key '{architecture}.rope.scaling.type' is {scaling[:40]!r}, expected one of "
            f"{', '.join(_ROPE_SCALINGS)}"
        )


def _wrong(layout: Layout, key: str, value: int | None, least: int, most: int) -> RemoeError:
    return RemoeError(f"{layout.path}: key '{key}' is {value}, expected {least} to {most}")


def _check_tokens(layout: Layout) -> None:
    """Each token must be there once: llama.cpp counts the words that it can look up."""
    field = layout.fields.get(_TOKENS)
    if field is None or field.item_type != GGUFValueType.STRING:
        return
    if field.count > MAX_TOKENS:
        raise RemoeError(f"{layout.path}: key '{_TOKENS}' has {field.count} tokens, expected at most {MAX_TOKENS}")
    with layout.source.open() as descriptor:
        data = layout.source.read(descriptor, field.payload, field.end - field.payload)
    seen: dict[bytes, int] = {}
    position = 0
    for index in range(field.count):
        (length,) = struct.unpack_from("<Q", data, position)
        # Words are C strings in llama.cpp, and one without letters gets a name.
        word = data[position + 8 : position + 8 + length].partition(b"\0")[0] or b"[EMPTY_%d]" % index
        position += 8 + length
        if seen.setdefault(word, index) != index:
            raise RemoeError(
                f"{layout.path}: token {word[:40].decode(errors='replace')!r} is in the vocabulary twice, as "
                f"{seen[word]} and as {index}: the file is damaged; download it again"
            )
