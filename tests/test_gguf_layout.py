"""The GGUF reader believes nothing: it agrees with gguf-py on good files and names the fault of bad ones."""

import os
import struct
import tempfile
import tracemalloc
from pathlib import Path

import gguf_maker as make
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import TENSOR_TYPES, Layout, TensorType, read_layout, read_model

SCALARS = {
    "uint8": st.integers(0, 2**8 - 1),
    "int8": st.integers(-(2**7), 2**7 - 1),
    "uint16": st.integers(0, 2**16 - 1),
    "int16": st.integers(-(2**15), 2**15 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "bool": st.booleans(),
}
values = st.one_of(*(st.tuples(st.just(kind), strategy) for kind, strategy in SCALARS.items()))
texts = st.tuples(st.just("string"), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
arrays = st.tuples(
    st.just("array"),
    st.one_of(
        st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9),
        st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=9),
    ),
)
keys = st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=30)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(keys, st.one_of(values, texts, arrays), max_size=8),
    st.dictionaries(keys, shapes, max_size=6),
    st.sampled_from([8, 32, 256]),
)
def test_agrees_with_gguf_py(
    metadata: dict[str, tuple[str, object]], tensors: dict[str, list[int]], alignment: int
) -> None:
    metadata = {f"test.{key}": value for key, value in metadata.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.gguf")
        writer = GGUFWriter(path, "test")
        writer.add_custom_alignment(alignment)
        for key, (kind, value) in metadata.items():
            getattr(writer, f"add_{kind}")(key, value)
        for name, shape in tensors.items():
            writer.add_tensor(name, np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        layout, reader = read_layout(path), GGUFReader(path)

        assert layout.alignment == alignment
        assert [(t.name, t.type.id, list(t.shape), t.start, t.nbytes) for t in layout.tensors.values()] == [
            (t.name, t.tensor_type, t.shape.tolist(), t.data_offset, t.n_bytes) for t in reader.tensors
        ]
        for key, (kind, value) in metadata.items():
            field = layout.fields[key]
            if kind == "string":
                assert layout.text(key) == value
            elif kind == "array":
                assert field.item_type is not None
                assert [GGUFValueType.ARRAY, field.item_type] == reader.fields[key].types
                assert field.count == len(reader.fields[key].data)
            else:
                assert field.value == value
        # Fields follow one another without a gap from the end of the fixed part.
        ends = [24] + [field.end for field in layout.fields.values()]
        assert [field.start for field in layout.fields.values()] == ends[:-1]


@pytest.mark.parametrize("tensor_type", TENSOR_TYPES.values(), ids=lambda t: str(t.name))
def test_every_tensor_type_has_its_size(tmp_path: Path, tensor_type: TensorType) -> None:
    shape = (tensor_type.block * 2, 3)
    nbytes = tensor_type.nbytes * 6
    path = tmp_path / "t.gguf"
    path.write_bytes(make.gguf(tensors=[make.tensor("t", shape, tensor_type.id)], data=bytes(nbytes)))
    assert read_layout(path).tensors["t"].nbytes == nbytes
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RemoeError, match=f"'t' takes bytes 96 to {96 + nbytes}, but the file has {95 + nbytes}"):
        read_layout(path)


def test_tensors_may_lie_in_any_order_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "gaps.gguf"
    tensors = [make.tensor("b", (4,), offset=128), make.tensor("a", (4,), offset=32)]
    path.write_bytes(make.gguf(tensors=tensors, data=bytes(144)))
    layout = read_layout(path)
    assert {name: tensor.start for name, tensor in layout.tensors.items()} == {"b": 224, "a": 128}


F32_DATA = bytes(16)
GOOD_TENSOR = make.tensor("t", (4,))
STRING, UINT8, ARRAY = GGUFValueType.STRING, GGUFValueType.UINT8, GGUFValueType.ARRAY

BAD_FILES = {
    "empty": (b"", "not a GGUF file: .* found only 0 bytes"),
    "other file": (b"PK\3\4" + bytes(100), r"not a GGUF file: .* found b'PK\\x03\\x04'"),
    "no version": (b"GGUF\3", r"version needs 4 bytes, but the file ends after 1"),
    "version 1": (make.gguf(version=1), "GGUF version 1, expected 2 or 3"),
    "version 4": (make.gguf(version=4), "GGUF version 4, expected 2 or 3"),
    "version 0": (make.gguf(version=0), "GGUF version 0, expected 2 or 3"),
    "big endian": (make.gguf(version=3 << 24), "big-endian GGUF file; .*gguf-convert-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), f"tensor count is {2**63}, expected at most 65536"),
    "metadata count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), f"metadata count is {2**64 - 1}"),
    "metadata missing": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "length of metadata key 0 needs 8 bytes"),
    "empty key": (make.gguf([make.u32_field("", 1)]), "length of metadata key 0 is 0, expected 1 to 65535"),
    "long key": (make.gguf([make.u32_field("k" * 65536, 1)]), "length of metadata key 0 is 65536"),
    "key not UTF-8": (make.gguf([make.field(b"\xff", UINT8, b"\1")]), "metadata key 0 is not UTF-8"),
    "key unprintable": (make.gguf([make.u32_field("a\x1b[2J", 1)]), "metadata key 0 has unprintable characters"),
    "duplicate key": (make.gguf([make.u32_field("k", 1)] * 2), "metadata key 'k' occurs twice .at offset 41"),
    "value type": (make.gguf([make.field("k", 13, b"")]), "'k': value type is 13, expected 0 to 12"),
    "value missing": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + make.field("k", GGUFValueType.UINT64, b"\0"),
        "'k': value needs 8 bytes, but the file ends after 1",
    ),
    "string length": (
        make.gguf([make.field("k", STRING, struct.pack("<Q", 2**64 - 1))]),
        f"'k': string needs {2**64 - 1} bytes, but the file ends",
    ),
    "array type": (make.gguf([make.array_field("k", 99, 0, b"")]), "'k': element type is 99"),
    "array of arrays": (make.gguf([make.array_field("k", ARRAY, 1, bytes(20))]), "'k': an array of arrays"),
    "array length": (
        make.gguf([make.array_field("k", GGUFValueType.UINT64, 2**61, b"")]),
        f"'k': array of {2**61} UINT64 needs {2**64} bytes",
    ),
    "string array length": (
        make.gguf([make.array_field("k", STRING, 2**60, b"")]),
        f"'k': array of {2**60} strings needs {2**63} bytes",
    ),
    "string in array": (
        make.gguf([make.array_field("k", STRING, 2, make.text("a") + struct.pack("<Q", 10**6))]),
        "'k': string 1 of 2 needs 1000000 bytes",
    ),
    "alignment type": (
        make.gguf([make.field("general.alignment", GGUFValueType.UINT64, struct.pack("<Q", 32))]),
        "general.alignment is of type UINT64, expected UINT32",
    ),
    "alignment 0": (make.gguf([make.u32_field("general.alignment", 0)]), "general.alignment is 0, expected a power"),
    "alignment 48": (make.gguf([make.u32_field("general.alignment", 48)]), "general.alignment is 48"),
    "alignment huge": (make.gguf([make.u32_field("general.alignment", 2**31)]), f"general.alignment is {2**31}"),
    "tensors missing": (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "length of name of tensor 0 needs 8 bytes"),
    "empty name": (make.gguf(tensors=[make.tensor("", (4,))]), "length of name of tensor 0 is 0, expected 1 to 63"),
    "long name": (make.gguf(tensors=[make.tensor("n" * 64, (4,))]), "length of name of tensor 0 is 64"),
    "duplicate tensor": (
        make.gguf(tensors=[GOOD_TENSOR, make.tensor("t", (4,), offset=32)], data=bytes(64)),
        "tensor 't' occurs twice",
    ),
    "no dimensions": (make.gguf(tensors=[make.tensor("t", ())]), "'t' has 0 dimensions, expected 1 to 4"),
    "five dimensions": (make.gguf(tensors=[make.tensor("t", (1,) * 5)], data=F32_DATA), "'t' has 5 dimensions"),
    "dimension 0": (make.gguf(tensors=[make.tensor("t", (4, 0))]), r"'t' has shape \[4, 0\], expected 1 to 2\^63 - 1"),
    "elements wrap": (make.gguf(tensors=[make.tensor("t", (2**32, 2**32))]), r"'t' has shape \[4294967296, 42949"),
    "bytes wrap": (
        make.gguf(tensors=[make.tensor("t", (2**62,))], data=F32_DATA),
        f"'t' takes bytes 64 to {2**64 + 64}, but the file has 80",
    ),
    "tensor type": (make.gguf(tensors=[make.tensor("t", (4,), 4)]), "'t' has type 4, which is not a ggml type"),
    "row length": (
        make.gguf(tensors=[make.tensor("t", (33,), GGMLQuantizationType.Q4_0)]),
        "'t' has rows of 33 elements, expected a multiple of 32 for type Q4_0",
    ),
    "unaligned": (
        make.gguf(tensors=[make.tensor("t", (4,), offset=16)], data=bytes(64)),
        "'t' has data offset 16, expected a multiple of 32",
    ),
    "outside": (
        make.gguf(tensors=[make.tensor("t", (4,), offset=2**64 - 32)], data=F32_DATA),
        f"'t' takes bytes {2**64 + 32} to {2**64 + 48}, but the file has 80",
    ),
    "overlap": (
        make.gguf(tensors=[make.tensor("t", (16,)), make.tensor("u", (4,), offset=32)], data=bytes(64)),
        "tensors 't' .bytes 96 to 160. and 'u' .from byte 128. overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(RemoeError, match=message) as refusal:
        read_layout(path)
    assert str(path) in str(refusal.value)


def test_refuses_every_truncation(tmp_path: Path) -> None:
    path = make.write_base(tmp_path / "whole.gguf", layers=1)
    content = path.read_bytes()
    end = max(tensor.end for tensor in read_layout(path).tensors.values())
    for length in [*range(0, 600, 7), *range(600, end, 101), end - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(RemoeError):
            read_layout(path)


def test_refuses_a_header_without_end(tmp_path: Path) -> None:
    path = tmp_path / "endless.gguf"
    path.write_bytes(make.gguf([make.field("k", STRING, struct.pack("<Q", 2**35))]))
    os.truncate(path, 2**36)
    with pytest.raises(RemoeError, match="'k': string ends beyond 134217728 bytes, the most"):
        read_layout(path)


def test_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match=r"none\.gguf: cannot be read: No such file"):
        read_layout(tmp_path / "none.gguf")
    with pytest.raises(RemoeError, match="not a regular file"):
        read_layout(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RemoeError, match="not a regular file"):
        read_layout(tmp_path / "pipe")


def test_refuses_a_file_that_changed_since(tmp_path: Path) -> None:
    path = make.write_base(tmp_path / "m.gguf")
    layout = read_layout(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RemoeError, match="changed while it was being read"):
        layout.text("general.name")


def test_typed_access_tells_a_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "typed.gguf"
    path.write_bytes(make.gguf([make.u32_field("n", 7), make.field("s", STRING, make.text("x"))]))
    layout = read_layout(path)
    assert (layout.integer("n"), layout.text("s")) == (7, "x")
    assert (layout.integer("none"), layout.text("none")) == (None, None)
    with pytest.raises(RemoeError, match="key 's' is of type STRING, expected an integer"):
        layout.integer("s")
    with pytest.raises(RemoeError, match="key 'n' is of type UINT32, expected a string"):
        layout.text("n")


MUTATED = make.gguf(
    [
        make.u32_field("general.alignment", 32),
        make.field("general.name", STRING, make.text("name")),
        make.array_field("tokens", STRING, 3, make.text("a") + make.text("bc") + make.text("")),
        make.array_field("scores", GGUFValueType.FLOAT32, 3, bytes(12)),
    ],
    [make.tensor("a.weight", (32, 2), GGMLQuantizationType.Q4_0), make.tensor("b.weight", (4, 2, 2), offset=64)],
    bytes(128),
)


@settings(max_examples=400, deadline=2000)
@given(
    st.lists(st.tuples(st.integers(0, len(MUTATED) - 129), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.integers(0, len(MUTATED) - 137), st.integers(0, 2**64 - 1)), max_size=1),
    st.integers(0, len(MUTATED)) | st.just(len(MUTATED)),
)
def test_damage_is_told_or_harmless(
    changed_bytes: list[tuple[int, int]], changed_words: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(MUTATED)
    for position, value in changed_bytes:
        content[position] = value
    for position, word in changed_words:
        content[position : position + 8] = word.to_bytes(8, "little")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.gguf")
        path.write_bytes(content[:length])
        tracemalloc.start()
        try:
            layout: Layout | None = read_layout(path)
        except RemoeError:
            layout = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < 4 << 20
    for tensor in layout.tensors.values() if layout else ():
        assert tensor.nbytes > 0
        assert tensor.end <= length


def test_reads_all_parts_whichever_is_named(tmp_path: Path) -> None:
    first = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:
        assert [layout.path for layout in read_model(part)] == parts
    assert first == parts[0]


def test_refuses_a_split_that_is_not_whole(tmp_path: Path) -> None:
    first = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
    second = tmp_path / "m-00002-of-00003.gguf"
    moved = second.rename(tmp_path / "other.gguf")
    with pytest.raises(RemoeError, match=r"m-00002-of-00003\.gguf: part 2 of 3 is missing"):
        read_model(first)
    with pytest.raises(RemoeError, match=r"other\.gguf: is one of 3 parts of a split GGUF, but is not named like one"):
        read_model(moved)
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(RemoeError, match=r"m-00002-of-00003\.gguf: key 'split\.no' is 2, expected 1"):
        read_model(first)
    second.write_bytes(make.gguf())
    with pytest.raises(RemoeError, match=r"key 'split\.no' is None, expected 1"):
        read_model(first)


def test_refuses_parts_of_another_split(tmp_path: Path) -> None:
    def part(number: int, tensors: list[str], total: int) -> None:
        fields = [make.u32_field("split.no", number), make.u32_field("split.count", 2)]
        fields.append(make.u32_field("split.tensors.count", total))
        entries = [make.tensor(name, (8,), offset=32 * i) for i, name in enumerate(tensors)]
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        path.write_bytes(make.gguf(fields, entries, bytes(32 * len(tensors))))

    part(0, ["a", "b"], 3)
    part(1, ["b"], 3)
    with pytest.raises(RemoeError, match="tensor 'b' is in another part"):
        read_model(tmp_path / "m-00001-of-00002.gguf")
    part(1, ["c", "d"], 3)
    with pytest.raises(RemoeError, match=r"key 'split\.tensors\.count' is 3, but the parts have 4"):
        read_model(tmp_path / "m-00001-of-00002.gguf")
