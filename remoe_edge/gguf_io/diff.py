"""What differs between two GGUFs, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from remoe_edge.gguf_io.layout import Field, Layout, Tensor, TensorType, read_model

Progress = Callable[[int, int], None]
"""Called with the bytes of tensor data compared so far and in all, of one of the two models."""

# A multiple of every block size. Dequantizing takes up to about 100 bytes an element in passing.
_CHUNK_ELEMENTS = 1 << 18

_SHOWN_BYTES = 100

_PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.I8: np.dtype("i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs. Types and shapes (row length first) are None where the model has no such tensor.

    `differing_bytes` is None unless both have one type and shape. `max_abs` is the largest |b - a| over all elements,
    `relative_l2` is the norm of b - a over the norm of a; both are None where the shapes differ, where the gguf package
    cannot dequantize a type, and where the number is not finite.
    """

    name: str
    type_a: str | None
    type_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    differing_bytes: int | None = None
    max_abs: float | None = None
    relative_l2: float | None = None


@dataclass(frozen=True)
class MetadataDifference:
    """A metadata key that differs. `a` and `b` are the values for people to read, None where there is no such key."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Difference:
    """All differences, in the order of the first model, then of the second; and how many tensors are the same."""

    tensors: list[TensorDifference]
    metadata: list[MetadataDifference]
    equal_tensors: int


def diff(path_a: Path, path_b: Path, *, progress: Progress = lambda done, total: None) -> Difference:
    """Compare the tensors and the metadata of two models; either may be any part of a split GGUF.

    Memory does not grow with the files. Raises RemoeError for what `read_model` refuses and for read errors.
    """
    model_a, model_b = read_model(path_a), read_model(path_b)
    tensors_a, tensors_b = _tensors(model_a), _tensors(model_b)
    total = sum(tensor.nbytes for _, tensor in tensors_a.values())
    done = 0
    differences = []
    for name in tensors_a | tensors_b:
        difference = _compare(tensors_a.get(name), tensors_b.get(name))
        if difference is not None:
            differences.append(difference)
        if name in tensors_a:
            done += tensors_a[name][1].nbytes
            progress(done, total)
    return Difference(
        differences,
        # The other parts of a split model only say which part they are.
        _compare_metadata(model_a[0], model_b[0]),
        equal_tensors=len(tensors_a | tensors_b) - len(differences),
    )


def _tensors(model: list[Layout]) -> dict[str, tuple[Layout, Tensor]]:
    return {name: (layout, tensor) for layout in model for name, tensor in layout.tensors.items()}


def _compare(a: tuple[Layout, Tensor] | None, b: tuple[Layout, Tensor] | None) -> TensorDifference | None:
    """The difference of two tensors of one name, of which at least one is there; None if they are the same."""
    tensor_a, tensor_b = (found[1] if found else None for found in (a, b))
    known = tensor_a or tensor_b
    assert known is not None
    differing_bytes = None
    if a and b and (a[1].type, a[1].shape) == (b[1].type, b[1].shape):
        differing_bytes = _count_differing_bytes(a, b)
        if not differing_bytes:
            return None
    max_abs, relative_l2 = _distance(a, b) if a and b and a[1].shape == b[1].shape else (None, None)
    return TensorDifference(
        known.name,
        tensor_a.type.name if tensor_a else None,
        tensor_b.type.name if tensor_b else None,
        tensor_a.shape if tensor_a else None,
        tensor_b.shape if tensor_b else None,
        differing_bytes,
        max_abs,
        relative_l2,
    )


def _count_differing_bytes(a: tuple[Layout, Tensor], b: tuple[Layout, Tensor]) -> int:
    count = 0
    for part_a, part_b in zip(_chunks(*a), _chunks(*b), strict=True):
        # Almost every chunk is the same, and comparing bytes says so at memory speed.
        if part_a != part_b:
            count += int(np.count_nonzero(np.frombuffer(part_a, np.uint8) != np.frombuffer(part_b, np.uint8)))
    return count


def _distance(a: tuple[Layout, Tensor], b: tuple[Layout, Tensor]) -> tuple[float | None, float | None]:
    """The largest |b - a| and |b - a|_2 / |a|_2 of two tensors of one shape."""
    largest = square_difference = square_a = 0.0
    with np.errstate(all="ignore"):
        for part_a, part_b in zip(_chunks(*a), _chunks(*b), strict=True):
            values_a, values_b = _values(part_a, a[1].type), _values(part_b, b[1].type)
            if values_a is None or values_b is None:
                return None, None
            difference = np.abs(values_b - values_a)
            peak = float(difference.max())
            if not math.isfinite(peak):
                return None, None
            largest = max(largest, peak)
            square_difference += float(difference @ difference)
            square_a += float(values_a @ values_a)
    relative = math.sqrt(square_difference / square_a) if square_a else math.inf
    return largest, relative if math.isfinite(relative) else None


def _chunks(layout: Layout, tensor: Tensor) -> Iterator[bytes]:
    """The data of a tensor in parts of `_CHUNK_ELEMENTS` elements, whatever its type."""
    size = _CHUNK_ELEMENTS // tensor.type.block * tensor.type.nbytes
    with layout.source.open() as descriptor:
        for start in range(tensor.start, tensor.end, size):
            yield layout.source.read(descriptor, start, min(size, tensor.end - start))


def _values(data: bytes, tensor_type: TensorType) -> npt.NDArray[np.float64] | None:
    """The elements as float64; None if the gguf package cannot dequantize the type."""
    try:
        known_type = GGMLQuantizationType(tensor_type.id)
        if known_type in _PLAIN:
            return np.frombuffer(data, _PLAIN[known_type]).astype(np.float64)
        return dequantize(np.frombuffer(data, np.uint8), known_type).astype(np.float64)
    except (ValueError, NotImplementedError):
        return None


def _compare_metadata(a: Layout, b: Layout) -> list[MetadataDifference]:
    differences = []
    for key in a.fields | b.fields:
        field_a, field_b = a.fields.get(key), b.fields.get(key)
        if field_a and field_b and _same_value(a, field_a, b, field_b):
            continue
        differences.append(MetadataDifference(key, _shown(a, field_a), _shown(b, field_b)))
    return differences


def _same_value(a: Layout, field_a: Field, b: Layout, field_b: Field) -> bool:
    def kind(field: Field) -> tuple[Any, ...]:
        return field.type, field.item_type, field.count, field.end - field.payload

    if kind(field_a) != kind(field_b):
        return False
    length = field_a.end - field_a.payload
    with a.source.open() as descriptor_a, b.source.open() as descriptor_b:
        return all(
            a.source.read(descriptor_a, field_a.payload + offset, min(_CHUNK_ELEMENTS, length - offset))
            == b.source.read(descriptor_b, field_b.payload + offset, min(_CHUNK_ELEMENTS, length - offset))
            for offset in range(0, length, _CHUNK_ELEMENTS)
        )


def _shown(layout: Layout, field: Field | None) -> str | None:
    if field is None:
        return None
    if field.item_type is not None:
        return f"array of {field.count} {field.item_type.name}"
    if field.value is not None:
        return str(field.value)
    # Long texts, chat templates above all, are told apart by their start and length.
    length = field.end - field.payload
    with layout.source.open() as descriptor:
        text = layout.source.read(descriptor, field.payload, min(length, _SHOWN_BYTES)).decode(errors="replace")
    return repr(text) if length <= _SHOWN_BYTES else f"{text!r}... ({length} bytes)"
