"""Writing a GGUF whose tensor data arrive in pieces, so that memory stays small whatever the size of the file."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Piece = npt.NDArray[Any]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. ``shape`` is in GGUF order, row length first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[NewTensor],
    data: Callable[[NewTensor], Iterable[Piece]],
    progress: Callable[[int], None] = lambda _written: None,
    alignment: int = GGUF_DEFAULT_ALIGNMENT,
) -> None:
    """Write ``path``. ``data`` gives the bytes of each tensor as contiguous arrays, ``nbytes`` in all, in file order.

    Every tensor starts on a multiple of ``alignment``. A bool is written as bool, an int as uint32 (as int32 in an
    array), a float as float32. ``progress`` is called with the bytes of tensor data written so far.
    """
    writer = GGUFWriter(path, arch)
    if alignment != GGUF_DEFAULT_ALIGNMENT:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        # The type decides; the numpy type is not looked at.
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        written = 0
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            before = written
            for piece in data(tensor):
                file.write(piece.data)
                written += piece.nbytes
                progress(written)
            assert written - before == tensor.nbytes, f"{tensor.name}: {written - before} bytes, not {tensor.nbytes}"
            writer.write_padding(file, tensor.nbytes)
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    # A bool is an int too, so it comes first.
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
