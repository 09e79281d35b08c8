"""Where everything lies in a GGUF file, checked before it is believed.

GGUF files come from strangers, and a copy tool that trusts their lengths leaks or loses data (CVE-2026-7482 is exactly
that). So this reader checks every length against the bytes that remain, computes every product in unbounded integers,
bounds everything it keeps in memory, and accepts a tensor only if its whole extent lies inside the file. It reads the
header alone, never tensor data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.source import Source

MAX_HEADER_BYTES = 128 << 20
"""Many times the largest header seen (two arrays of 250,000 strings, 10 MB); bounds the time a hostile file costs."""

MAX_ENTRIES = 65_536
"""Most metadata keys and most tensors a file may have; bounds the memory a hostile file costs."""

MAX_TEXT_BYTES = 1 << 20
"""Longest string value that `Layout.text` gives; longer ones are not needed here, only copied."""

DEFAULT_ALIGNMENT = 4096
"""Of files made here: a page, and what O_DIRECT asks for on all common storage."""

MAX_ALIGNMENT = 1 << 20
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}


_EXPERT_TENSOR = re.compile(r"blk\.[0-9]+\.ffn_(up|gate|down|gate_up)_(ch)?exps\.weight")


@dataclass(frozen=True)
class TensorType:
    """A ggml type: `block` elements take `nbytes` bytes."""

    id: int
    name: str
    block: int
    nbytes: int


TENSOR_TYPES = {t.value: TensorType(t.value, t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
# The pinned llama.cpp has this type; the gguf package on PyPI (0.19.0) does not yet.
TENSOR_TYPES.setdefault(42, TensorType(42, "Q2_0", 64, 18))


@dataclass(frozen=True)
class Field:
    """One metadata entry, as byte positions in the file.

    The entry takes [start, end): key, type, value. Its value without length and element type starts at `payload`.
    `value` holds numbers and booleans; strings and arrays stay in the file (see `Layout.text`).
    """

    key: str
    type: GGUFValueType
    item_type: GGUFValueType | None
    count: int
    start: int
    payload: int
    end: int
    value: int | float | bool | None


@dataclass(frozen=True)
class Tensor:
    """One tensor. `shape` is in GGUF order (row length first); `start` is the absolute position of its data."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    @property
    def experts(self) -> int:
        """Slices, one per expert and one after the other, that the cache reads; 0 for a tensor that is not experts'."""
        return self.shape[2] if len(self.shape) == 3 and _EXPERT_TENSOR.fullmatch(self.name) else 0

    @property
    def slice_bytes(self) -> int:
        """Length of an expert's slice; 0 for a tensor that is not experts'."""
        return self.nbytes // self.experts if self.experts else 0

    def aligned_slices(self, alignment: int) -> int:
        """How many experts' slices start on a multiple of `alignment`."""
        if not self.experts:
            return 0
        # Which i of 0 ... experts - 1 have start + i * slice_bytes = 0 modulo alignment? A file from strangers may have
        # billions, so they are not tried one by one.
        step = math.gcd(self.slice_bytes, alignment)
        if self.start % step:
            return 0
        period = alignment // step
        first = -self.start // step * pow(self.slice_bytes // step, -1, period) % period
        return len(range(first, self.experts, period))


@dataclass(frozen=True)
class Layout:
    """A checked GGUF file: metadata fields and tensors in file order, by name."""

    source: Source
    version: int
    alignment: int
    fields: dict[str, Field]
    tensors: dict[str, Tensor]

    @property
    def path(self) -> Path:
        return self.source.path

    def integer(self, key: str) -> int | None:
        """The value of an integer field, None if there is none. Raises RemoeError if it is no integer."""
        field = self.fields.get(key)
        if field is None:
            return None
        if type(field.value) is not int:
            raise RemoeError(f"{self.path}: key '{key}' is of type {field.type.name}, expected an integer")
        return field.value

    def integers(self, key: str, count: int) -> list[int] | None:
        """`count` values, one per block, of a field that holds one for all of them or an array; None if there is none.

        Raises RemoeError if it holds no integers, or fewer, or if `count`, which a tensor's name can give, is huge.
        """
        if count > MAX_ENTRIES:
            raise RemoeError(f"{self.path}: has a tensor of block {count - 1}, expected at most {MAX_ENTRIES - 1}")
        field = self.fields.get(key)
        if field is None or field.type != GGUFValueType.ARRAY:
            single = self.integer(key)
            return None if single is None else [single] * count
        form = _SCALARS.get(field.item_type or GGUFValueType.ARRAY, "")
        if form[-1:] not in tuple("BbHhIiQq") or not count <= field.count <= MAX_ENTRIES:
            item = field.item_type.name if field.item_type is not None else None
            raise RemoeError(f"{self.path}: key '{key}' holds {field.count} of {item}, expected {count} integers")
        with self.source.open() as descriptor:
            data = self.source.read(descriptor, field.payload, field.count * struct.calcsize(form))
        return [int(value) for (value,) in struct.iter_unpack(form, data)][:count]

    def text(self, key: str) -> str | None:
        """The value of a string field, None if there is none. Raises RemoeError if it is no string or too long."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.type != GGUFValueType.STRING:
            raise RemoeError(f"{self.path}: key '{key}' is of type {field.type.name}, expected a string")
        length = field.end - field.payload
        if length > MAX_TEXT_BYTES:
            raise RemoeError(f"{self.path}: key '{key}' has {length} bytes, expected at most {MAX_TEXT_BYTES}")
        with self.source.open() as descriptor:
            return self.source.read(descriptor, field.payload, length).decode(errors="replace")


def align(offset: int, alignment: int) -> int:
    """`offset` rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def check_alignment(alignment: int) -> None:
    """Raise RemoeError unless a GGUF written here may have this alignment: a power of two, 32 to MAX_ALIGNMENT.

    ggml asks for a power of two (gguf.cpp), the GGUF specification for a multiple of 8. Less than the default of 32
    would put tensors where ggml's kernels do not expect them when the file is mapped.
    """
    if not GGUF_DEFAULT_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise RemoeError(
            f"an alignment of {alignment} bytes is not possible; use a power of two from {GGUF_DEFAULT_ALIGNMENT} to "
            f"{MAX_ALIGNMENT}, such as {DEFAULT_ALIGNMENT}"
        )


def read_layout(path: Path) -> Layout:
    """Read and check the header of one GGUF file.

    Raises RemoeError, naming the file and the key, tensor or offset, for anything that is not a sound GGUF v2 or v3
    file: not GGUF, big endian, truncated, a duplicate or malformed entry, or a tensor outside the file or on top of
    another one. Gaps between tensors and tensors in any order are accepted.
    """
    source = Source.of(path)
    with source.open() as descriptor, os.fdopen(descriptor, "rb", buffering=1 << 16, closefd=False) as file:
        return _Parser(source, file).layout()


SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
"""File name of one part of a split GGUF; numbers start at 1. Source: llama_split_path in llama.cpp."""


def shard_paths(path: Path) -> list[Path]:
    """All files of the split GGUF that `path` is a part of, by its name; `path` alone if it is not part of one."""
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def read_model(path: Path) -> list[Layout]:
    """Read one model: a GGUF file, or all parts of a split one when `path` names any of them.

    Raises RemoeError for what `read_layout` refuses, and for a part that is missing, misnumbered, of another split, or
    repeats a tensor.
    """
    paths = shard_paths(path)
    for number, part in enumerate(paths, start=1):
        if len(paths) > 1 and not part.exists():
            raise RemoeError(f"{part}: part {number} of {len(paths)} is missing; all parts must be in one folder")
    layouts = [read_layout(part) for part in paths]
    if len(layouts) == 1:
        count = layouts[0].integer("split.count")
        if count is not None and count > 1:
            raise RemoeError(
                f"{path}: is one of {count} parts of a split GGUF, but is not named like one; "
                f"name the parts NAME-00001-of-{count:05d}.gguf and so on"
            )
        return layouts
    names: set[str] = set()
    for number, layout in enumerate(layouts):
        for key, expected in ("split.no", number), ("split.count", len(layouts)):
            found = layout.integer(key)
            if found != expected:
                raise RemoeError(f"{layout.path}: key '{key}' is {found}, expected {expected} by the file's name")
        if repeated := names & layout.tensors.keys():
            raise RemoeError(f"{layout.path}: tensor '{min(repeated)}' is in another part of the split GGUF, too")
        names |= layout.tensors.keys()
    for layout in layouts:
        total = layout.integer("split.tensors.count")
        if total is not None and total != len(names):
            raise RemoeError(f"{layout.path}: key 'split.tensors.count' is {total}, but the parts have {len(names)}")
    return layouts


def has_experts(path: Path) -> bool:
    """Whether a GGUF says that its model has experts. Raises RemoeError if it is no GGUF."""
    layout = read_model(path)[0]
    return bool(layout.integer(f"{layout.text('general.architecture')}.expert_count"))


class _Parser:
    """A position in the header of one file. Every read says what it is for, so that its failure can be told."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self.source = source
        self.file = file
        self.position = 0
        self.limit = min(source.size, MAX_HEADER_BYTES)

    def layout(self) -> Layout:
        version = self.magic_and_version()
        tensor_count = self.count("tensor count", MAX_ENTRIES)
        field_count = self.count("metadata count", MAX_ENTRIES)
        fields: dict[str, Field] = {}
        for index in range(field_count):
            field = self.field(index)
            if field.key in fields:
                raise self.error(f"metadata key '{field.key}' occurs twice", field.start)
            fields[field.key] = field
        alignment = self.alignment(fields)
        tensors: dict[str, Tensor] = {}
        for index in range(tensor_count):
            start = self.position
            tensor = self.tensor(index, alignment)
            if tensor.name in tensors:
                raise self.error(f"tensor '{tensor.name}' occurs twice", start)
            tensors[tensor.name] = tensor
        # Offsets count from the start of the data, which is known only now.
        data_start = align(self.position, alignment)
        tensors = {name: replace(tensor, start=data_start + tensor.start) for name, tensor in tensors.items()}
        self.check_extents(tensors)
        return Layout(self.source, version, alignment, fields, tensors)

    def error(self, what: str, offset: int | None = None) -> RemoeError:
        where = self.position if offset is None else offset
        return RemoeError(f"{self.source.path}: {what} (at offset {where})")

    def take(self, length: int, what: str) -> bytes:
        self.require(length, what)
        data = self.file.read(length)
        if len(data) != length:
            raise self.error(f"{what}: the file became shorter while it was being read")
        self.position += length
        return data

    def skip(self, length: int, what: str) -> None:
        self.require(length, what)
        self.position += length
        self.file.seek(self.position)

    def require(self, length: int, what: str) -> None:
        if length <= self.limit - self.position:
            return
        if self.position + length > self.source.size:
            remaining = self.source.size - self.position
            raise self.error(
                f"{what} needs {length} bytes, but the file ends after {remaining}: it is truncated or damaged; "
                "copy or download it again"
            )
        raise self.error(f"{what} ends beyond {MAX_HEADER_BYTES} bytes, the most that a GGUF header may take here")

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, most: int) -> int:
        start = self.position
        value = self.u64(what)
        if value > most:
            raise self.error(f"{what} is {value}, expected at most {most}", start)
        return value

    def name(self, what: str, most: int) -> str:
        """A key or tensor name: short and printable, because it is looked up, printed and written again."""
        start = self.position
        length = self.u64(f"length of {what}")
        if not 0 < length <= most:
            raise self.error(f"length of {what} is {length}, expected 1 to {most}", start)
        data = self.take(length, what)
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8", start) from None
        if not name.isprintable():
            raise self.error(f"{what} has unprintable characters", start)
        return name

    def magic_and_version(self) -> int:
        if self.source.size < 4 or (magic := self.take(4, "magic")) != b"GGUF":
            found = repr(magic) if self.source.size >= 4 else f"only {self.source.size} bytes"
            raise RemoeError(f"{self.source.path}: not a GGUF file: expected it to start with b'GGUF', found {found}")
        version = self.u32("version")
        # Versions are small numbers: one with an empty lower half was written with the other byte order.
        if version and version & 0xFFFF == 0:
            raise RemoeError(
                f"{self.source.path}: a big-endian GGUF file; make it little endian with gguf-convert-endian first"
            )
        if version not in (2, 3):
            raise RemoeError(
                f"{self.source.path}: GGUF version {version}, expected 2 or 3; convert the model again from its source"
            )
        return version

    def value_type(self, what: str) -> GGUFValueType:
        start = self.position
        code = self.u32(what)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.error(f"{what} is {code}, expected 0 to {max(GGUFValueType)}", start) from None

    def field(self, index: int) -> Field:
        start = self.position
        key = self.name(f"metadata key {index}", MAX_KEY_BYTES)
        what = f"metadata key '{key}'"
        field_type = self.value_type(f"{what}: value type")
        item_type, count, value = None, 1, None
        payload = self.position
        if field_type == GGUFValueType.ARRAY:
            item_type, count, payload = self.array(what)
        elif field_type == GGUFValueType.STRING:
            length = self.u64(f"{what}: string length")
            payload = self.position
            self.skip(length, f"{what}: string")
        else:
            form = _SCALARS[field_type]
            (value,) = struct.unpack(form, self.take(struct.calcsize(form), f"{what}: value"))
        return Field(key, field_type, item_type, count, start, payload, self.position, value)

    def array(self, what: str) -> tuple[GGUFValueType, int, int]:
        start = self.position
        item_type = self.value_type(f"{what}: element type")
        count = self.u64(f"{what}: element count")
        payload = self.position
        if item_type == GGUFValueType.ARRAY:
            raise self.error(f"{what}: an array of arrays, which GGUF readers do not accept", start)
        if item_type != GGUFValueType.STRING:
            self.skip(count * struct.calcsize(_SCALARS[item_type]), f"{what}: array of {count} {item_type.name}")
            return item_type, count, payload
        # Each string has at least its length: a wrong count is found before the loop, not by it.
        self.require(count * 8, f"{what}: array of {count} strings")
        for item in range(count):
            self.skip(self.u64(what), f"{what}: string {item} of {count}")
        return item_type, count, payload

    def alignment(self, fields: dict[str, Field]) -> int:
        field = fields.get("general.alignment")
        if field is None:
            return GGUF_DEFAULT_ALIGNMENT
        if field.type != GGUFValueType.UINT32 or type(field.value) is not int:
            raise self.error(f"general.alignment is of type {field.type.name}, expected UINT32", field.start)
        if not 0 < field.value <= MAX_ALIGNMENT or field.value & (field.value - 1):
            raise self.error(
                f"general.alignment is {field.value}, expected a power of two up to {MAX_ALIGNMENT}", field.start
            )
        return field.value

    def tensor(self, index: int, alignment: int) -> Tensor:
        """A tensor whose `start` still counts from the start of the data."""
        start = self.position
        name = self.name(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        what = f"tensor '{name}'"
        dimensions = self.u32(f"{what}: dimension count")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{what} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}", start)
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, f"{what}: shape"))
        elements = math.prod(shape)
        if not 0 < elements < 1 << 63:
            raise self.error(f"{what} has shape {list(shape)}, expected 1 to 2^63 - 1 elements", start)
        type_id = self.u32(f"{what}: type")
        if type_id not in TENSOR_TYPES:
            raise self.error(f"{what} has type {type_id}, which is not a ggml type known here", start)
        tensor_type = TENSOR_TYPES[type_id]
        if shape[0] % tensor_type.block:
            raise self.error(
                f"{what} has rows of {shape[0]} elements, expected a multiple of {tensor_type.block} "
                f"for type {tensor_type.name}",
                start,
            )
        offset = self.u64(f"{what}: data offset")
        if offset % alignment:
            raise self.error(f"{what} has data offset {offset}, expected a multiple of {alignment}", start)
        return Tensor(name, tensor_type, shape, offset, elements // tensor_type.block * tensor_type.nbytes)

    def check_extents(self, tensors: dict[str, Tensor]) -> None:
        previous: Tensor | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            if tensor.end > self.source.size:
                raise RemoeError(
                    f"{self.source.path}: tensor '{tensor.name}' takes bytes {tensor.start} to {tensor.end}, but the "
                    f"file has {self.source.size}: it is truncated or damaged; copy or download it again"
                )
            if previous is not None and tensor.start < previous.end:
                raise RemoeError(
                    f"{self.source.path}: tensors '{previous.name}' (bytes {previous.start} to {previous.end}) and "
                    f"'{tensor.name}' (from byte {tensor.start}) overlap: the file is damaged; download it again"
                )
            previous = tensor
