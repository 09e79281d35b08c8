"""Router tensors of a Hugging Face checkpoint, under the names they have in a GGUF.

Only safetensors are read, never a pickle. The files are validated by the safetensors package; tensor data are read
here, one router tensor at a time, because numpy has no bfloat16 and the experts beside them must stay unread.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import MODEL_TENSOR
from gguf.tensor_mapping import TensorNameMap
from safetensors import SafetensorError, safe_open

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.source import Source

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
"""The limit that the safetensors package sets for the header of one file; indexes of real models take up to 20 MB."""

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_NO_PICKLE = (
    "pickled checkpoints are not read, because they can run code; save the router with "
    "safetensors.torch.save_file(state_dict, 'router.safetensors')"
)
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

# Names without wrappers' prefixes, the layer written {bid}: the table of llama.cpp's own converter. What it writes
# e_score_correction is e_score_correction_bias in checkpoints, while expert_bias and router_bias carry no suffix.
_WRAPPERS = re.compile(r"(?:base_model\.model\.|module\.)*")
_LAYER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_GGUF_SUFFIXES = {
    template + suffix: gguf_suffix
    for tensor, suffixes in (
        (MODEL_TENSOR.FFN_GATE_INP, {".weight": "ffn_gate_inp.weight", ".bias": "ffn_gate_inp.bias"}),
        (MODEL_TENSOR.FFN_EXP_PROBS_B, dict.fromkeys(("", "_bias", ".bias"), "exp_probs_b.bias")),
    )
    for template in TensorNameMap.block_mappings_cfg[tensor]
    for suffix, gguf_suffix in suffixes.items()
}


def gguf_router_name(key: str) -> str | None:
    """The GGUF name of a checkpoint's router tensor; None for every other key.

    `model.layers.3.mlp.gate.weight` is `blk.3.ffn_gate_inp.weight`. Prefixes of PEFT and of data parallel training are
    dropped, and so is the `language_model.` of multimodal models. `mtp.*` keys are no router of the model proper.
    """
    name = key[_WRAPPERS.match(key).end() :].replace("language_model.", "", 1)  # type: ignore[union-attr]
    layer = _LAYER.search(name)
    if layer is None:
        return None
    suffix = _GGUF_SUFFIXES.get(f"{name[: layer.start()]}{{bid}}{name[layer.end() :]}")
    return None if suffix is None else f"blk.{int(layer[0])}.{suffix}"


@dataclass(frozen=True)
class RouterTensor:
    """A router tensor in a safetensors file. `shape` is in row-major order: [experts, hidden] or [experts]."""

    source: Source
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def load(self) -> npt.NDArray[np.float32]:
        """The values as little-endian float32, which holds F32, F16 and BF16 exactly.

        Raises RemoeError if one is NaN or infinite, or if the file changed since it was looked at.
        """
        dtype = _DTYPES[self.dtype]
        with self.source.open() as descriptor:
            data = self.source.read(descriptor, self.start, math.prod(self.shape) * dtype.itemsize)
        stored = np.frombuffer(data, dtype).reshape(self.shape)
        values = (stored.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else stored.astype("<f4", copy=False)
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise RemoeError(
                f"{self.source.path}: tensor '{self.key}' has {values[place]} at {list(place)}; "
                "a router needs finite weights, so look for the step at which training diverged"
            )
        return values


@dataclass(frozen=True)
class Router:
    """All router tensors of a checkpoint, by GGUF name."""

    path: Path
    tensors: dict[str, RouterTensor]

    @property
    def sources(self) -> list[Source]:
        return list({tensor.source.path: tensor.source for tensor in self.tensors.values()}.values())


def read_router(path: Path) -> Router:
    """Find the router tensors in a .safetensors file, or in the folder of a Hugging Face checkpoint.

    In a folder with an index only the files that hold a router are opened. Raises RemoeError for a pickle, for a file
    that is damaged or missing, for a router that is not F32, F16 or BF16, and where there is no router or two of one.
    """
    tensors: dict[str, RouterTensor] = {}
    for file, indexed in _checkpoint_files(path).items():
        present = read_safetensors(file)
        for key in indexed or present:
            name = gguf_router_name(key)
            if name is None:
                continue
            if key not in present:
                raise RemoeError(f"{file}: has no tensor '{key}', which {INDEX_NAME} says is here; download it again")
            tensor = present[key]
            if tensor.dtype not in _DTYPES:
                raise RemoeError(f"{file}: tensor '{key}' is {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
            if name in tensors:
                other = tensors[name]
                raise RemoeError(
                    f"{file}: tensor '{key}' is the same router, {name}, as '{other.key}' of {other.source.path.name}"
                )
            tensors[name] = tensor
    if not tensors:
        raise RemoeError(
            f"{path}: has no router tensor; expected names such as model.layers.0.mlp.gate.weight, "
            "model.layers.0.mlp.router.weight or model.layers.0.block_sparse_moe.gate.weight"
        )
    return Router(path, tensors)


def _checkpoint_files(path: Path) -> dict[Path, list[str] | None]:
    """The safetensors files to read, each with the keys that the index places there (None without an index)."""
    if not path.is_dir():
        if path.suffix.lower() in _PICKLES:
            raise RemoeError(f"{path}: {_NO_PICKLE}")
        return {path: None}
    if (path / INDEX_NAME).exists():
        index = read_index(path / INDEX_NAME)
        files = {file: keys for file, keys in index.items() if any(map(gguf_router_name, keys))}
        for file in files:
            if not file.exists():
                raise RemoeError(f"{file}: is missing, but {INDEX_NAME} says that it holds router tensors; download it")
        return dict(files)
    return dict.fromkeys(weight_files(path))


def weight_files(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    """The safetensors files of a folder without an index. Raises RemoeError if there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        pickled = any(file.suffix.lower() in _PICKLES for file in folder.iterdir())
        raise RemoeError(f"{folder}: has no {pattern.lstrip('*')} file" + (f"; {_NO_PICKLE}" if pickled else ""))
    return files


def read_index(path: Path) -> dict[Path, list[str]]:
    """The files that an index names, present or not, each with the keys it places there.

    Raises RemoeError if it is damaged, or if a name leads out of its folder.
    """
    source = Source.of(path)
    if source.size > MAX_INDEX_BYTES:
        raise RemoeError(f"{path}: has {source.size} bytes, expected at most {MAX_INDEX_BYTES} for an index")
    with source.open() as descriptor:
        index = parse_object(source, source.read(descriptor, 0, source.size))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise RemoeError(f"{path}: has no 'weight_map' object")
    files: dict[Path, list[str]] = {}
    for key, name in weight_map.items():
        # A name from a stranger's file must not lead out of the folder.
        if not isinstance(name, str) or PurePath(name).name != name or name in ("", ".."):
            raise RemoeError(f"{path}: places tensor {key!r} in {name!r}, which is not the name of a file beside it")
        files.setdefault(path.with_name(name), []).append(key)
    return files


def read_safetensors(path: Path) -> dict[str, RouterTensor]:
    """Every tensor of a file, by key. Bounds, overlaps and sizes are checked by the safetensors package.

    Raises RemoeError if the file cannot be read or is damaged.
    """
    source = Source.of(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise RemoeError(f"{path}: not a sound safetensors file: {error}") from error
    with source.open() as descriptor:
        header_size = int.from_bytes(source.read(descriptor, 0, 8), "little")
        header = parse_object(source, source.read(descriptor, 8, header_size))
    header.pop("__metadata__", None)
    return {
        key: RouterTensor(
            source, key, entry["dtype"], tuple(entry["shape"]), 8 + header_size + entry["data_offsets"][0]
        )
        for key, entry in header.items()
    }


def parse_object(source: Source, text: bytes) -> dict[str, Any]:
    """A JSON object in a file. Raises RemoeError, naming the file, if it is not one."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoeError(f"{source.path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RemoeError(f"{source.path}: not a JSON object")
    return parsed
