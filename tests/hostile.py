"""Hostile GGUFs: one small model that loads and runs, and one fault in it for each class that was published.

The classes are those of the advisories named beside the cases. llama.cpp is fixed against most of them; a reader of
ours must not bring them back, and what llama.cpp still ends the process on must be refused before it gets the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf_maker as make
from gguf import GGMLQuantizationType, GGUFValueType
from tiny_models import write_tiny_model

from remoe_edge.gguf_io.layout import read_layout

ARCH = "qwen3moe"
UP = "blk.0.ffn_up_exps.weight"
BLOCKS, EXPERTS, TOP_K = 2, 8, 2

U8, U32, I32, U64, F32 = (
    GGUFValueType[name] for name in ("UINT8", "UINT32", "INT32", "UINT64", "FLOAT32")
)  # fmt: skip
STRING, ARRAY, BOOL = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.BOOL
Q4_0 = GGMLQuantizationType.Q4_0

_U64_MAX = 2**64 - 1


@dataclass
class Entry:
    """A tensor as the header describes it; `offset` counts from the start of the data."""

    name: bytes
    shape: tuple[int, ...]
    type: int
    offset: int
    dimensions: int | None = None

    def encode(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        return make.text(self.name) + struct.pack(f"<I{len(self.shape)}QIQ", count, *self.shape, self.type, self.offset)


@dataclass
class Parts:
    """A GGUF taken apart: whatever is changed here is written as it is, sound or not."""

    fields: dict[str, bytes]
    tensors: list[Entry]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_fields: int | None = None
    cut: int | None = None

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.tensors if entry.name == name.encode())

    def encode(self) -> bytes:
        header = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(self.fields) if self.n_fields is None else self.n_fields,
        )
        header += b"".join(self.fields.values()) + b"".join(entry.encode() for entry in self.tensors)
        return (header + b"\0" * (-len(header) % self.alignment) + self.data)[: self.cut]


def write_sound_model(path: Path) -> Path:
    """The model that all cases are made of: 270 kB, two layers of eight experts, it decodes."""
    return write_tiny_model(path, ARCH, "Q4_0", n_expert=EXPERTS, k=TOP_K, n_layer=BLOCKS, hidden=64, ff=32)


def take_apart(path: Path) -> Parts:
    layout, content = read_layout(path), path.read_bytes()
    start = min(tensor.start for tensor in layout.tensors.values())
    return Parts(
        {key: content[field.start : field.end] for key, field in layout.fields.items()},
        [
            Entry(tensor.name.encode(), tensor.shape, tensor.type.id, tensor.start - start)
            for tensor in layout.tensors.values()
        ],
        content[start:],
    )


def _double_token_with_nul(parts: Parts) -> None:
    words = [make.text(f"same\0{i}") for i in range(2)] + [make.text(f"t{i}") for i in range(321)]
    parts.fields["tokenizer.ggml.tokens"] = make.array_field("tokenizer.ggml.tokens", STRING, 323, b"".join(words))


@dataclass(frozen=True)
class Case:
    """A fault. `message`, a regular expression, is what our readers say of it; None where it is nothing to a reader
    of the header, and only running the model is refused, with `refused`."""

    change: Callable[[Parts], object]
    message: str | None
    refused: str | None = None


def _field(key: str, value_type: int, payload: bytes) -> Callable[[Parts], object]:
    return lambda parts: parts.fields.update({key: make.field(key, value_type, payload)})


def _u32(key: str, value: int) -> Callable[[Parts], object]:
    return _field(key, U32, struct.pack("<I", value))


def _array(key: str, item: int, count: int, payload: bytes) -> Callable[[Parts], object]:
    return lambda parts: parts.fields.update({key: make.array_field(key, item, count, payload)})


def _set(**values: object) -> Callable[[Parts], object]:
    def change(parts: Parts) -> None:
        for name, value in values.items():
            setattr(parts, name, value)

    return change


def _tensor(which: str, /, **values: object) -> Callable[[Parts], object]:
    def change(parts: Parts) -> None:
        for key, value in values.items():
            setattr(parts[which], key, value)

    return change


def _add_tensor(*entries: Entry) -> Callable[[Parts], object]:
    return lambda parts: parts.tensors.extend(entries)


def _duplicate_tensor(parts: Parts) -> None:
    parts.tensors.append(replace(parts.tensors[0]))


def _shift_onto_previous(parts: Parts) -> None:
    parts[UP].offset -= 32


def _same_place(parts: Parts) -> None:
    # Two names for one extent: nothing is read outside, but a copy would be larger than the file.
    parts["blk.1.ffn_up_exps.weight"].offset = parts[UP].offset


def _without(key: str) -> Callable[[Parts], object]:
    return lambda parts: parts.fields.pop(key)


def _rename(old: str, new: str | bytes) -> Callable[[Parts], object]:
    return _tensor(old, name=new if isinstance(new, bytes) else new.encode())


def _double_token(parts: Parts) -> None:
    words = [make.text("same")] * 2 + [make.text(f"t{i}") for i in range(321)]
    parts.fields["tokenizer.ggml.tokens"] = make.array_field("tokenizer.ggml.tokens", STRING, 323, b"".join(words))


CASES = {
    # CVE-2024-21802: heap overflow through info->ne; CVE-2026-33298: ggml_nbytes wraps.
    "dims_product_wraps_to_zero": Case(_tensor(UP, shape=(2**32, 2**31, 2)), r"has shape \[4294967296, 2147"),
    "dims_product_is_negative": Case(_tensor(UP, shape=(2**62, 2, 1)), "expected 1 to 2.63 - 1 elements"),
    "dims_bytes_wrap": Case(_tensor(UP, type=0, shape=(2**61, 2, 1)), "takes bytes .* but the file has"),
    "dim_is_negative": Case(_tensor(UP, shape=(64, _U64_MAX, 8)), "has shape .*18446744073709551615"),
    "dim_is_zero": Case(_tensor(UP, shape=(64, 0, 8)), r"has shape \[64, 0, 8\], expected 1 to"),
    "dims_are_deep": Case(_tensor(UP, shape=(64, 32, 8, 1, 1)), "has 5 dimensions, expected 1 to 4"),
    "dims_are_huge_in_number": Case(_tensor(UP, dimensions=2**32 - 1), "has 4294967295 dimensions"),
    "dims_are_none": Case(_tensor(UP, shape=()), "has 0 dimensions"),
    "rows_are_no_blocks": Case(_tensor(UP, shape=(65, 32, 8)), "rows of 65 elements, expected a multiple of 32"),
    "tensor_type_is_unknown": Case(_tensor(UP, type=1000), "has type 1000, which is not a ggml type"),
    "tensor_type_is_negative": Case(_tensor(UP, type=2**32 - 1), "has type 4294967295, which is not a ggml type"),
    # CVE-2025-53630 and CVE-2026-27940: the sum of sizes wraps. CVE-2026-7482: extents outside the file are copied.
    "offset_wraps": Case(_tensor(UP, offset=2**64 - 32), "takes bytes 184467440737.* but the file has"),
    "offset_is_outside": Case(_tensor(UP, offset=2**40), "takes bytes .* but the file has"),
    "offset_is_unaligned": Case(_tensor(UP, offset=1), "has data offset 1, expected a multiple of 32"),
    "extent_is_outside": Case(_tensor("token_embd.weight", shape=(64, 323 * 1000)), "takes bytes .* but the file has"),
    "last_byte_is_missing": Case(lambda parts: _set(cut=len(parts.encode()) - 1)(parts), "takes bytes .* but the file"),
    "tensors_overlap": Case(_shift_onto_previous, "tensors .* and '.*overlap"),
    "tensors_share_bytes": Case(_same_place, "tensors .* and '.*overlap"),
    # CVE-2024-21836 (n_tensors) and CVE-2024-23605 (n_kv): counts times sizes wrap.
    "tensor_count_is_huge": Case(_set(n_tensors=2**63 - 1), "tensor count is 9223372036854775807"),
    "tensor_count_is_negative": Case(_set(n_tensors=_U64_MAX), "tensor count is 18446744073709551615"),
    "tensor_count_is_too_large_by_one": Case(
        lambda parts: _set(n_tensors=len(parts.tensors) + 1)(parts), "(length of )?name of tensor|needs .* bytes"
    ),
    "key_count_is_huge": Case(_set(n_fields=2**58), "metadata count is 288230376151711744"),
    "key_count_is_negative": Case(_set(n_fields=_U64_MAX), "metadata count is 18446744073709551615"),
    # CVE-2024-23496: gguf_fread_str, length + 1 wraps. CVE-2024-21825: count times size of an array wraps.
    "string_length_wraps": Case(_field("general.name", STRING, struct.pack("<Q", _U64_MAX)), "string needs 184467"),
    "string_length_is_huge": Case(_field("general.name", STRING, struct.pack("<Q", 2**40)), "string needs 10995116"),
    "key_length_wraps": Case(
        lambda parts: parts.fields.update({"x": struct.pack("<Q", _U64_MAX) + b"x" + struct.pack("<II", U32, 1)}),
        "length of metadata key .* is 18446744073709551615",
    ),
    "name_length_wraps": Case(
        lambda parts: parts.fields.update({"x": b""}) or _set(n_fields=len(parts.fields) - 1, tensors=[_Raw()])(parts),
        "length of name of tensor 0 is 18446744073709551615",
    ),
    "array_length_wraps": Case(_array("x", U64, 2**61, b""), "array of 2305843009213693952 UINT64 needs"),
    "array_length_is_huge": Case(_array("x", U8, 2**62, b""), "array of 4611686018427387904 UINT8 needs"),
    "string_array_length_is_huge": Case(_array("x", STRING, 2**61, b""), "strings needs 18446744073709551616 bytes"),
    "string_in_array_wraps": Case(_array("x", STRING, 1, struct.pack("<Q", _U64_MAX)), "string 0 of 1 needs 184467"),
    "array_of_arrays": Case(_array("x", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 100), "an array of arrays"),
    "array_item_type_is_unknown": Case(_array("x", 13, 1, bytes(8)), "element type is 13"),
    "value_type_is_unknown": Case(_field("x", 13, bytes(8)), "value type is 13"),
    "value_type_is_negative": Case(_field("x", 2**32 - 1, bytes(8)), "value type is 4294967295"),
    # Empty keys ended the process (llama.cpp issue 24884); names are copied into 64 bytes and used as C strings.
    "key_is_empty": Case(_field("", U32, struct.pack("<I", 1)), "length of metadata key .* is 0"),
    "key_has_nul": Case(_field("general.name\0x", U32, struct.pack("<I", 1)), "has unprintable characters"),
    "name_is_empty": Case(_rename(UP, ""), "length of name of tensor .* is 0"),
    "name_has_nul": Case(_rename(UP, UP + "\0x"), "has unprintable characters"),
    "name_is_long": Case(_rename(UP, "x" * 64), "length of name of tensor .* is 64"),
    "name_is_no_utf8": Case(_rename(UP, b"\xff\xfe"), "is not UTF-8"),
    "key_is_twice": Case(
        lambda parts: parts.fields.update({"again": make.u32_field(f"{ARCH}.block_count", 2)}), "occurs twice"
    ),
    "tensor_is_twice": Case(_duplicate_tensor, "tensor 'token_embd.weight' occurs twice"),
    # Alignment: GGML_PAD wraps, or the process aborts on it (reports of 2026).
    "alignment_is_0": Case(_u32("general.alignment", 0), "general.alignment is 0, expected a power of two"),
    "alignment_is_no_power_of_two": Case(_u32("general.alignment", 48), "general.alignment is 48"),
    "alignment_is_huge": Case(_u32("general.alignment", 2**31), "general.alignment is 2147483648"),
    "alignment_has_wrong_type": Case(
        _field("general.alignment", I32, struct.pack("<i", 32)), "general.alignment is of type INT32"
    ),
    # The frame.
    "version_is_1": Case(_set(version=1), "GGUF version 1, expected 2 or 3"),
    "version_is_of_the_future": Case(_set(version=4), "GGUF version 4"),
    "version_is_0": Case(_set(version=0), "GGUF version 0"),
    "byte_order_is_wrong": Case(_set(version=3 << 24), "big-endian"),
    "magic_is_wrong": Case(_set(magic=b"GGJT"), "not a GGUF file"),
    "file_ends_in_header": Case(_set(cut=400), "ends after|needs .* bytes"),
    "file_is_empty": Case(_set(cut=0), "found only 0 bytes"),
    # What a model says of itself. llama.cpp aborts on most of these (GGML_ASSERT).
    "architecture_is_a_number": Case(_u32("general.architecture", 1), None, "general.architecture.* is of type UINT32"),
    "architecture_is_missing": Case(_without("general.architecture"), None, "has no key 'general.architecture'"),
    "block_count_is_0": Case(_u32(f"{ARCH}.block_count", 0), None, "block_count' is 0"),
    # llama.cpp pull request 25821: arrays of 512 layers are written past their end.
    "block_count_is_huge": Case(_u32(f"{ARCH}.block_count", 513), None, "block_count' is 513"),
    "block_count_is_an_array": Case(
        _array(f"{ARCH}.block_count", U32, 2, bytes(8)), None, "block_count' is of type ARRAY"
    ),
    "block_count_is_a_string": Case(
        _field(f"{ARCH}.block_count", STRING, make.text("2")), None, "block_count' is of type STRING"
    ),
    "block_number_is_huge": Case(_rename(UP, "blk.99999999999.ffn_up_exps.weight"), None, "block 99999999999"),
    "prediction_layers_are_too_many": Case(_u32(f"{ARCH}.nextn_predict_layers", 3), None, "nextn_predict_layers' is 3"),
    "expert_count_is_huge": Case(_u32(f"{ARCH}.expert_count", 2**31), None, "expert_count' is 2147483648"),
    "expert_count_is_0": Case(_u32(f"{ARCH}.expert_count", 0), None, "expert"),
    "expert_count_is_a_float": Case(
        _field(f"{ARCH}.expert_count", F32, struct.pack("<f", 8)), None, "expert_count' is of type FLOAT32"
    ),
    "expert_used_count_is_0": Case(_u32(f"{ARCH}.expert_used_count", 0), None, "expert_used_count' is 0"),
    "expert_used_count_is_too_large": Case(_u32(f"{ARCH}.expert_used_count", 9), None, "expert_used_count' is 9"),
    "expert_used_count_is_negative": Case(
        _field(f"{ARCH}.expert_used_count", I32, struct.pack("<i", -1)), None, "expert_used_count' is -1"
    ),
    "expert_used_count_is_a_bool": Case(
        _field(f"{ARCH}.expert_used_count", BOOL, b"\1"), None, "expert_used_count' is of type BOOL"
    ),
    "expert_groups_do_not_divide": Case(_u32(f"{ARCH}.expert_group_count", 3), None, "expert_group_count' is 3"),
    "expert_groups_are_too_many": Case(_u32(f"{ARCH}.expert_group_count", 8), None, "expert_group_count' is 8"),
    "epsilon_is_negative": Case(
        _field(f"{ARCH}.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", -1)), None, "rms_epsilon' is -1.0"
    ),
    "epsilon_is_nan": Case(
        _field(f"{ARCH}.attention.layer_norm_rms_epsilon", F32, b"\xff" * 4), None, "rms_epsilon' is nan"
    ),
    "rope_scaling_is_unknown": Case(
        _field(f"{ARCH}.rope.scaling.type", STRING, make.text("x")), None, "rope.scaling.type' is 'x'"
    ),
    "token_is_twice": Case(_double_token, None, "token 'same' .* twice"),
    # Found by fuzzing: a null pointer is called. 9 is Q8_1, 24 to 28 are I8, I16, I32, I64 and F64.
    **{
        f"matrix_of_type_{kind}": Case(
            _tensor(name, type=kind, shape=shape), None, "'.*' is of type .*, which no matrix can be"
        )
        for kind, name, shape in (
            (9, "token_embd.weight", (64, 8)),
            (24, "output.weight", (64, 323)),
            (25, "output.weight", (64, 323)),
            (26, UP, (64, 8, 4)),
            (27, "output.weight", (64, 40)),
            (28, "output.weight", (64, 40)),
        )
    },
    "token_is_twice_before_nul": Case(_double_token_with_nul, None, "token 'same' .* twice"),
    # Sizes that contradict each other: found while a graph is built, in the code of one architecture.
    "rope_is_wider_than_heads": Case(_u32(f"{ARCH}.rope.dimension_count", 2), None, "llama.cpp cannot go on.*n_rot"),
    "token_types_are_too_few": Case(_array("tokenizer.ggml.token_type", I32, 1, bytes(4)), None, "token"),
    # Arrays with elements of one byte were read as if they had four.
    "token_types_are_bytes": Case(_array("tokenizer.ggml.token_type", U8, 323, bytes(323)), None, "token_type"),
    "scores_are_bytes": Case(_array("tokenizer.ggml.scores", U8, 323, bytes(323)), None, "scores"),
    "tokens_are_numbers": Case(_array("tokenizer.ggml.tokens", I32, 323, bytes(4 * 323)), None, "token"),
    "head_count_is_0": Case(_u32(f"{ARCH}.attention.head_count", 0), None, ""),
    "head_count_is_huge": Case(_u32(f"{ARCH}.attention.head_count", 2**32 - 1), None, ""),
    "embedding_length_is_huge": Case(_u32(f"{ARCH}.embedding_length", 2**32 - 1), None, ""),
    "experts_of_one_block_differ": Case(_tensor(UP, shape=(64, 64, 4)), None, "expert|shape"),
    "experts_have_one_dimension": Case(_tensor(UP, shape=(32,)), None, "shape|dimension|expert"),
    "expert_tensor_is_missing": Case(_rename(UP, "blk.0.ffn_other.weight"), None, "missing|ffn_up_exps"),
    "expert_tensor_has_four_dimensions": Case(_tensor(UP, shape=(64, 4, 8, 8)), None, "shape|dimension"),
}  # fmt: skip


class _Raw(Entry):
    """A tensor whose name has no end."""

    def __init__(self) -> None:
        super().__init__(b"", (), 0, 0)

    def encode(self) -> bytes:
        return struct.pack("<Q", _U64_MAX) + b"t" * 40


def write_case(path: Path, sound: Parts, case: Case) -> Path:
    """The sound model with the case's fault."""
    parts = replace(sound, fields=dict(sound.fields), tensors=[replace(entry) for entry in sound.tensors])
    case.change(parts)
    path.write_bytes(parts.encode())
    return path
