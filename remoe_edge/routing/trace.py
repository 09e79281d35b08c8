"""Routing traces: which experts a model chose, token by token and layer by layer.

A trace is an ``.npz`` with

- ``ids``    [tokens, layers, k] unsigned integers, the experts in the order in which the router ranked them; layers are
  MoE layers. ``uint16`` ids of 65535 mean that the layer was not computed for the token (llama.cpp skips the last layer
  for prompt tokens whose logits nobody asked for).
- ``offs``   [sequences + 1] integers, sequence s holds the tokens offs[s] to offs[s + 1] - 1.
- ``probs``  [tokens, layers, k] floats, optional, the router's weights.
- ``meta``   a JSON object: ``experts``, and where known ``model``, ``layers``, ``top_k``, ``phase``, ``source``,
  ``licence``.
"""

import hashlib
import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output
from remoe_edge.sizes import format_size

NOT_COMPUTED = 65535

MAX_TRACE_BYTES = 1 << 30
"""Most bytes the arrays of a trace may take; more than 2 million tokens of a model with 48 layers and top 8."""

_MAX_META_BYTES = 1 << 20
_MAX_HEADER_BYTES = 10_000
_MAX_MEMBERS = 64

# What zipfile and numpy raise on damaged files.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    # numpy, of an array's header that is no Python, or a dictionary of other than names.
    SyntaxError,
    TypeError,
    ValueError,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Trace:
    """A checked routing trace. Raises RemoeError when the arrays do not agree with each other or with ``meta``."""

    ids: Array
    """[tokens, layers, k], native unsigned integers."""
    offs: Array
    """[sequences + 1], int64."""
    meta: dict[str, Any]
    probs: Array | None = None
    """[tokens, layers, k], floats."""
    origin: str = field(default="trace")
    """What messages call this trace, usually its path."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    @property
    def experts(self) -> int:
        return int(self.meta["experts"])

    @cached_property
    def computed(self) -> npt.NDArray[np.bool_]:
        """[tokens, layers]: whether the layer chose experts for the token."""
        if self.ids.dtype != np.uint16:
            return np.ones(self.ids.shape[:2], dtype=np.bool_)
        computed: npt.NDArray[np.bool_] = (self.ids != NOT_COMPUTED).all(axis=2)
        return computed

    def digest(self) -> str:
        """sha256 of ids and offs, whatever integer type they are stored in."""
        digest = hashlib.sha256(json.dumps([*self.ids.shape, *self.offs.tolist()]).encode())
        digest.update(self.ids.astype("<u4").tobytes())
        return digest.hexdigest()


PACKAGED_TRACES = ("olmoe-1b-7b", "gpt-oss-20b", "deepseek-v2-lite")


def packaged_trace(name: str = PACKAGED_TRACES[0]) -> Trace:
    """A trace that ships with the package; by default OLMoE-1B-7B: 299 tokens, 16 layers, 64 experts, top 8.

    The others are the first sequences of longer ones: gpt-oss-20b (24 layers, 32 experts, top 4), DeepSeek-V2-Lite (26
    layers, 64 experts, top 6; teacher-forced text).
    """
    with as_file(files("remoe_edge") / "data" / f"{name}.npz") as path:
        return replace(load_trace(path), origin=f"{name}.npz (packaged)")


def load_trace(path: Path) -> Trace:
    """Read and check a trace. Raises RemoeError if it is not one, or larger than MAX_TRACE_BYTES."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            arrays = {name: _read_array(archive, member, path) for name, member in members.items()}
    except _UNREADABLE as error:
        raise RemoeError(f"{path}: not a readable .npz routing trace: {error}") from error
    return Trace(
        ids=_native(arrays["ids"]),
        offs=_offsets(arrays["offs"], path),
        meta=_meta(arrays["meta"], path),
        probs=_native(arrays["probs"]) if "probs" in arrays else None,
        origin=str(path),
    )


def save_trace(trace: Trace, path: Path, *, force: bool = False) -> None:
    """Write a trace; equal traces give equal bytes. Raises RemoeError if ``path`` exists and ``force`` is false."""
    arrays = {"ids": trace.ids, "offs": trace.offs, "meta": np.array(json.dumps(trace.meta))}
    if trace.probs is not None:
        arrays["probs"] = trace.probs
    with atomic_output(path, force=force) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            # ZipInfo's own default is a fixed date.
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data.getvalue())


def excerpt(trace: Trace, *, sequence: int = 0, tokens: int | None = None) -> Trace:
    """The ``tokens`` tokens from the start of ``sequence`` on, across later sequences if it is shorter; all if None.

    Sequences count from 0, negative ones from the end. ``meta`` says where the excerpt begins (``first_token``). Raises
    RemoeError if there is no such sequence or there are too few tokens from there on.
    """
    sequences = len(trace.offs) - 1
    if not -sequences <= sequence < sequences:
        raise RemoeError(
            f"{trace.origin}: has no sequence {sequence}, only 0 to {sequences - 1} (or -{sequences} to -1)"
        )
    start = int(trace.offs[sequence % sequences])
    end = trace.tokens if tokens is None else start + tokens
    if not start < end <= trace.tokens:
        raise RemoeError(
            f"{trace.origin}: has {trace.tokens - start} tokens from sequence {sequence} on, "
            f"{'none' if tokens is None else tokens} of them cannot be taken"
        )
    if (start, end) == (0, trace.tokens):
        return trace
    inside = trace.offs[(trace.offs > start) & (trace.offs < end)]
    return replace(
        trace,
        ids=trace.ids[start:end],
        offs=np.concatenate([[start], inside, [end]]) - start,
        meta={**trace.meta, "first_token": start + int(trace.meta.get("first_token") or 0)},
        probs=None if trace.probs is None else trace.probs[start:end],
    )


@dataclass(frozen=True)
class ReuseRate:
    """Share of a token's experts that the token before it in the same sequence chose too (EOR)."""

    total: float | None
    """Mean over steps and layers; None if no sequence has two tokens."""
    per_layer: list[float | None]


def reuse_rate(trace: Trace) -> ReuseRate:
    """mean |E[t] ∩ E[t-1]| / K over the steps within sequences at which both tokens were computed."""
    follows = np.ones(trace.tokens, dtype=np.bool_)
    follows[trace.offs[:-1][trace.offs[:-1] < trace.tokens]] = False
    shared = np.zeros(trace.layers)
    steps = np.zeros(trace.layers)
    for layer in range(trace.layers):
        ids, computed = trace.ids[:, layer], trace.computed[:, layer]
        valid = follows[1:] & computed[1:] & computed[:-1]
        now, before = ids[1:][valid], ids[:-1][valid]
        shared[layer] = sum(int((now == before[:, [rank]]).sum()) for rank in range(trace.top_k))
        steps[layer] = valid.sum()
    pairs = steps * trace.top_k
    return ReuseRate(
        total=float(shared.sum() / pairs.sum()) if pairs.any() else None,
        per_layer=[float(s / p) if p else None for s, p in zip(shared, pairs, strict=True)],
    )


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise RemoeError(f"{path}: {len(infos)} entries are too many for a routing trace")
    members = {}
    for name in ("ids", "offs", "meta", "probs"):
        found = [info for info in infos if info.filename == f"{name}.npy"]
        if len(found) > 1:
            raise RemoeError(f"{path}: holds '{name}' {len(found)} times")
        if found:
            members[name] = found[0]
        elif name != "probs":
            raise RemoeError(f"{path}: has no '{name}'; a routing trace holds ids, offs and meta")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members.values()):
        raise RemoeError(f"{path}: is compressed in a way that .npz files are not")
    # Python 3.12 looks at this itself.
    if any(info.header_offset < 0 for info in members.values()):
        raise RemoeError(f"{path}: is damaged: its directory places an array before the start of the file")
    # What the archive declares is what zipfile hands out at most, so this bounds memory before anything is unpacked.
    total = sum(info.file_size for info in members.values())
    if total > MAX_TRACE_BYTES:
        raise RemoeError(f"{path}: unpacks to {format_size(total)}, the limit is {format_size(MAX_TRACE_BYTES)}")
    if members["meta"].file_size > _MAX_META_BYTES:
        raise RemoeError(f"{path}: 'meta' unpacks to {format_size(members['meta'].file_size)}")
    return members


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Array:
    with archive.open(member) as stream:
        shape, dtype = _npy_header(stream, member, path)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or stream.tell() + declared != member.file_size:
            raise RemoeError(
                f"{path}: '{member.filename}' declares shape {shape} of {dtype}, {declared} bytes, "
                f"but holds {member.file_size - stream.tell()}"
            )
        stream.seek(0)
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _npy_header(stream: IO[bytes], member: zipfile.ZipInfo, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER_BYTES)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream, max_header_size=_MAX_HEADER_BYTES)
    else:
        raise RemoeError(f"{path}: '{member.filename}' is of .npy version {version[0]}.{version[1]}, expected 1.0")
    return shape, dtype


def _native(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _offsets(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "iu":
        raise RemoeError(f"{path}: 'offs' is of type {array.dtype}, expected integers")
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise RemoeError(f"{path}: 'offs' does not rise from 0 to the number of tokens")
    return array.astype(np.int64)


def _meta(array: Array, path: Path) -> dict[str, Any]:
    if array.dtype.kind != "U" or array.shape != ():
        raise RemoeError(f"{path}: 'meta' is of type {array.dtype} and shape {array.shape}, expected one string")
    try:
        # Not str(array): numpy makes strings of numbers that are no characters, on which the interpreter fails.
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        meta = json.loads(little.tobytes().decode("utf-32-le").rstrip("\0"))
        # Half a character ("\\ud800") is JSON, but no text: nothing that holds it can be written.
        json.dumps(meta, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RemoeError(f"{path}: 'meta' is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise RemoeError(f"{path}: 'meta' is not a JSON object")
    return meta


def _check(trace: Trace) -> None:
    where, ids, offs = trace.origin, trace.ids, trace.offs
    if ids.ndim != 3 or ids.dtype.kind != "u" or 0 in ids.shape:
        raise RemoeError(
            f"{where}: 'ids' is {ids.dtype} of shape {ids.shape}, expected unsigned integers [tokens, layers, k]"
        )
    if (
        offs.ndim != 1
        or len(offs) < 2
        or offs[0] != 0
        or offs[-1] != len(ids)
        # Compared, not subtracted: differences of hostile values overflow.
        or (offs[1:] < offs[:-1]).any()
    ):
        raise RemoeError(f"{where}: 'offs' does not rise from 0 to the number of tokens, {len(ids)}")
    experts = trace.meta.get("experts")
    if type(experts) is not int or not ids.shape[2] <= experts <= NOT_COMPUTED:
        raise RemoeError(
            f"{where}: 'experts' in 'meta' is {experts!r}, expected a number from {ids.shape[2]} to {NOT_COMPUTED}"
        )
    for key, actual in (("layers", ids.shape[1]), ("top_k", ids.shape[2])):
        if trace.meta.get(key, actual) != actual:
            raise RemoeError(f"{where}: '{key}' in 'meta' is {trace.meta[key]!r}, but 'ids' has {actual}")
    first = trace.meta.get("first_token")
    if first is not None and (type(first) is not int or not 0 <= first < 1 << 32):
        raise RemoeError(f"{where}: 'first_token' in 'meta' is {first!r}, expected a number from 0 to 2^32 - 1")
    if trace.probs is not None and (trace.probs.dtype.kind != "f" or trace.probs.shape != ids.shape):
        raise RemoeError(
            f"{where}: 'probs' is {trace.probs.dtype} of shape {trace.probs.shape}, expected floats {ids.shape}"
        )
    bad = (ids >= experts).any(axis=2) & trace.computed
    if ids.dtype == np.uint16:
        bad |= (ids == NOT_COMPUTED).any(axis=2) & ~(ids == NOT_COMPUTED).all(axis=2)
    _refuse_first(bad, trace, f"names an expert that does not exist, there are {experts}")
    ordered = np.sort(ids, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
    _refuse_first(twice & trace.computed, trace, "names an expert twice")


def _refuse_first(bad: npt.NDArray[np.bool_], trace: Trace, what: str) -> None:
    if bad.any():
        token, layer = np.argwhere(bad)[0]
        raise RemoeError(f"{trace.origin}: token {token}, layer {layer} {what}: {trace.ids[token, layer].tolist()}")
