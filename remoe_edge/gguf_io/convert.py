"""Put a router into a GGUF, lay its tensors out on other boundaries, or both: plan every byte, then copy and replace.

The output has the base's metadata and tensors in the base's order. Router tensors are written as F32, whatever they
were, so that the exported router is exactly the trained one; the data of every other tensor are copied as they are.

llama.cpp demands that tensors follow one another with no gap but the padding to ``general.alignment`` (gguf.cpp). So
that key is what moves expert tensors to page boundaries, and it pads all other tensors too.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGMLQuantizationType, GGUFValueType

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing, same_file
from remoe_edge.gguf_io.layout import (
    SHARD_NAME,
    TENSOR_TYPES,
    Layout,
    Tensor,
    align,
    check_alignment,
    read_layout,
    read_model,
    shard_paths,
)
from remoe_edge.gguf_io.router import Router, RouterTensor, read_router
from remoe_edge.gguf_io.source import Source
from remoe_edge.sizes import format_size

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of the whole output."""

_ALIGNMENT = "general.alignment"
_WEIGHT = "ffn_gate_inp.weight"
_ROUTER_NAME = re.compile(r"blk\.([0-9]+)\.(ffn_gate_inp\.weight|ffn_gate_inp\.bias|exp_probs_b\.bias)")
_F32 = TENSOR_TYPES[GGMLQuantizationType.F32.value]

# A kernel call copies without passing through memory here; this much of it between two reports of progress.
_KERNEL_CHUNK = 64 << 20
_BUFFER = 8 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Replacement:
    """A router tensor of the base and what takes its place."""

    old: Tensor
    new: Tensor
    router: RouterTensor


@dataclass(frozen=True)
class Extent:
    """Bytes [start, start + length) of the base file."""

    start: int
    length: int


@dataclass(frozen=True)
class FilePlan:
    """One output file: what goes where. Offsets that no piece covers are padding and stay zero."""

    base: Layout
    target: Path
    alignment: int
    size: int
    tensors: dict[str, Tensor]
    pieces: list[tuple[int, bytes | Extent | RouterTensor]]


@dataclass(frozen=True)
class SliceAlignment:
    """How many of a model's expert slices start on a multiple of `alignment` bytes.

    Slices of one tensor follow one another without gaps, so all of them do only where `slice_bytes`, the sizes that
    occur, are multiples; else the first of each tensor and few others do.
    """

    alignment: int
    slices: int
    aligned_before: int
    aligned: int
    slice_bytes: list[int]


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do.

    `kept` names the router tensors of the base that stay because ROUTER has none of their kind; `metadata` holds the
    keys that are added or changed (`general.alignment` in every part of a split model, the others in the first).
    """

    files: list[FilePlan]
    replacements: list[Replacement]
    kept: list[str]
    metadata: dict[str, str | int]

    @property
    def input_bytes(self) -> int:
        return sum(file.base.source.size for file in self.files)

    @property
    def output_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def copied_bytes(self) -> int:
        """Bytes of tensor data that are copied from the base unchanged."""
        tensors = sum(tensor.nbytes for file in self.files for tensor in file.tensors.values())
        return tensors - sum(replacement.new.nbytes for replacement in self.replacements)

    def slice_alignment(self) -> SliceAlignment:
        """Of the output, for the alignment that its tensors have."""
        alignment = min(file.alignment for file in self.files)
        before = [tensor for file in self.files for tensor in file.base.tensors.values() if tensor.experts]
        after = [tensor for file in self.files for tensor in file.tensors.values() if tensor.experts]
        return SliceAlignment(
            alignment,
            slices=sum(tensor.experts for tensor in after),
            aligned_before=sum(tensor.aligned_slices(alignment) for tensor in before),
            aligned=sum(tensor.aligned_slices(alignment) for tensor in after),
            slice_bytes=sorted({tensor.slice_bytes for tensor in after}),
        )


def convert(
    base: Path,
    router: Path | None,
    output: Path,
    *,
    alignment: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Write `output`: the model `base` with the router of `router`. Returns what `plan_conversion` planned.

    With `alignment` every tensor starts on a multiple of so many bytes, else of as many as in `base`. Without `router`
    that is all that changes.

    `base` may be any part of a split GGUF; the output is then split at the same tensors. The same inputs give the same
    bytes. Memory does not grow with the file. Raises RemoeError for bad input and failed writes; there is then no
    output, and an older one is as it was. (Parts of a split output appear one after another, the first one last; only
    a crash in between can leave some of them.)
    """
    plan = plan_conversion(base, router, output, alignment=alignment, force=force)
    _write(plan, force, progress)
    return plan


def plan_conversion(
    base: Path, router: Path | None, output: Path, *, alignment: int | None = None, force: bool = False
) -> Plan:
    """Check everything that can be checked without writing, and say what `convert` would do.

    Raises RemoeError for all that `read_model`, `read_router` and `check_alignment` refuse; where base and router
    differ in layers, experts or width; for a weight that is NaN or infinite; where nothing would change, or there are
    no experts to align; where the output is one of the inputs, exists without `force`, is not named like the base's
    parts, or does not fit on the disk.
    """
    if alignment is not None:
        check_alignment(alignment)
    layouts = read_model(base)
    if alignment is not None:
        _check_experts(layouts)
    if router is None:
        _check_change(layouts, alignment)
    new_router = read_router(router) if router is not None else None
    targets = _output_paths(output, layouts)
    inputs = [layout.source for layout in layouts] + (new_router.sources if new_router else [])
    for target in targets:
        _check_target(target, inputs, force)
    routers = _match(layouts, new_router) if new_router else {}
    metadata: dict[str, str | int] = _provenance(layouts[0], _hash(routers)) if new_router else {}
    metadata["remoe.tool.version"] = __version__
    aligned: dict[str, str | int] = {}
    # llama.cpp reads the key of each part for that part.
    if alignment is not None and any(layout.alignment != alignment for layout in layouts):
        aligned[_ALIGNMENT] = alignment
    metadata |= aligned
    files = [
        _plan_file(layout, target, metadata if layout is layouts[0] else aligned, routers, alignment)
        for layout, target in zip(layouts, targets, strict=True)
    ]
    _check_space(files)
    return Plan(
        files,
        replacements=[
            Replacement(file.base.tensors[name], tensor, routers[name])
            for file in files
            for name, tensor in file.tensors.items()
            if name in routers
        ],
        kept=[name for file in files for name in file.tensors if _ROUTER_NAME.fullmatch(name) and name not in routers],
        metadata=metadata,
    )


def _check_experts(layouts: list[Layout]) -> None:
    if not any(tensor.experts for layout in layouts for tensor in layout.tensors.values()):
        raise RemoeError(f"{layouts[0].path}: has no expert tensors to align: it is not a Mixture-of-Experts model")


def _check_change(layouts: list[Layout], alignment: int | None) -> None:
    """Raise RemoeError if there is nothing to do without a router."""
    path = layouts[0].path
    if alignment is None:
        raise RemoeError(f"{path}: nothing to convert; name a router, or an alignment")
    if all(layout.alignment == alignment for layout in layouts):
        raise RemoeError(f"{path}: its tensors are aligned to {alignment} bytes already; there is nothing to do")


def _output_paths(output: Path, layouts: list[Layout]) -> list[Path]:
    """`output` for each part of the base; of a split one `output` may be named like the whole or like a part."""
    count = len(layouts)
    match = SHARD_NAME.fullmatch(output.name)
    named_count = int(match["count"]) if match else 1
    if named_count not in {1, count}:
        parts = "one file" if count == 1 else f"{count} parts"
        raise RemoeError(f"{output}: is named like one of {named_count} parts, but the base is {parts}; rename it")
    if count == 1 or named_count == count:
        return shard_paths(output)
    return shard_paths(output.with_name(f"{output.name.removesuffix('.gguf')}-00001-of-{count:05d}.gguf"))


def _check_target(target: Path, inputs: list[Source], force: bool) -> None:
    for source in inputs:
        if same_file(target, source.path):
            raise RemoeError(f"{target}: is the same file as the input {source.path}; choose another output path")
    refuse_existing(target, force)
    if not target.resolve().parent.is_dir():
        raise RemoeError(f"{target}: its folder does not exist; create it first")


def _check_space(files: list[FilePlan]) -> None:
    # Holes of a sparse base stay holes, so the base's blocks count, not its length.
    need = sum(min(file.size, os.stat(file.base.path).st_blocks * 512 + _BUFFER) for file in files)
    folder = files[0].target.resolve().parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise RemoeError(
            f"{folder}: has {format_size(free)} free, but the output needs {format_size(need)}; "
            "free some space or choose another folder"
        )


def _match(layouts: list[Layout], router: Router) -> dict[str, RouterTensor]:
    """The router tensor for each base tensor to replace. Raises RemoeError unless they fit one another."""
    base = {name: (layout, tensor) for layout in layouts for name, tensor in layout.tensors.items()}
    base_layers = _layers(base)
    router_layers = _layers(router.tensors)
    path = layouts[0].path
    if not base_layers.get(_WEIGHT):
        raise RemoeError(f"{path}: has no router tensor (blk.N.{_WEIGHT}): it is not a Mixture-of-Experts model")
    # Multi-token prediction layers, last in the file, are not in every checkpoint of the same model.
    prediction_layers = _prediction_layers(layouts[0])
    for kind, layers in router_layers.items():
        here = base_layers.get(kind, set())
        if surplus := layers - here:
            raise RemoeError(f"{router.path}: has a surplus {kind} for {_listed(surplus)}, where {path.name} has none")
    for kind, layers in base_layers.items():
        there = router_layers.get(kind, set())
        # A router trained without its bias leaves the base's: all layers have one kind of tensor, or none has.
        if (there or kind == _WEIGHT) and (missing := layers - there - prediction_layers):
            raise RemoeError(f"{router.path}: has no {kind} for {_listed(missing)}, where {path.name} has one")
    for name, tensor in router.tensors.items():
        expected = base[name][1].shape[::-1]
        if tensor.shape != expected:
            raise RemoeError(
                f"{tensor.source.path}: tensor '{tensor.key}' has shape {list(tensor.shape)}, expected "
                f"{list(expected)} for {name} of {base[name][0].path.name}"
            )
    return {name: router.tensors[name] for name in base if name in router.tensors}


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """The layers that have each kind of router tensor."""
    layers: dict[str, set[int]] = {}
    for name in names:
        if match := _ROUTER_NAME.fullmatch(name):
            layers.setdefault(match[2], set()).add(int(match[1]))
    return layers


def _prediction_layers(base: Layout) -> set[int]:
    architecture = base.text("general.architecture")
    blocks = base.integer(f"{architecture}.block_count") or 0
    predicting = base.integer(f"{architecture}.nextn_predict_layers") or 0
    return {layer for layer in _layers(base.tensors).get(_WEIGHT, set()) if blocks - predicting <= layer < blocks}


def _listed(layers: set[int]) -> str:
    shown = [str(layer) for layer in sorted(layers)[:8]]
    if len(layers) > len(shown):
        shown.append(f"{len(layers) - len(shown)} more")
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(shown)}"


def _hash(routers: dict[str, RouterTensor]) -> str:
    """SHA-256 of the router as the output has it: for each tensor by name, the name, a zero byte, the F32 data."""
    digest = hashlib.sha256()
    for name in sorted(routers):
        digest.update(name.encode() + b"\0")
        digest.update(routers[name].load().data)
    return digest.hexdigest()


def _provenance(base: Layout, router_hash: str) -> dict[str, str | int]:
    """Where the output comes from, as metadata. What the base says of its own origin is kept."""
    finetune = base.text("general.finetune") or ""
    metadata: dict[str, str | int] = {
        "general.finetune": finetune if finetune.endswith("ReMoE") else f"{finetune}-ReMoE".lstrip("-"),
        "remoe.router.sha256": router_hash,
    }
    if not base.integer("general.base_model.count"):
        metadata["general.base_model.count"] = 1
        described = {key: base.text(f"general.{key}") for key in ("name", "version", "organization", "url", "repo_url")}
        shard = SHARD_NAME.fullmatch(base.path.name)
        described["name"] = described["name"] or (shard["prefix"] if shard else base.path.stem)
        metadata |= {f"general.base_model.0.{key}": value for key, value in described.items() if value}
    return metadata


def _plan_file(
    base: Layout,
    target: Path,
    metadata: dict[str, str | int],
    routers: dict[str, RouterTensor],
    alignment: int | None,
) -> FilePlan:
    """Lay out one output file: header, then tensors in the base's order without gaps, as llama.cpp demands."""
    alignment = alignment or base.alignment
    tensors = {
        name: replace(tensor, type=_F32, nbytes=math.prod(tensor.shape) * _F32.nbytes) if name in routers else tensor
        for name, tensor in base.tensors.items()
    }
    field_count = len(base.fields.keys() | metadata.keys())
    header: list[bytes | Extent] = [
        b"GGUF" + struct.pack("<IQQ", base.version, len(tensors), field_count),
        *(
            _encode_field(key, metadata[key]) if key in metadata else Extent(field.start, field.end - field.start)
            for key, field in base.fields.items()
        ),
        *(_encode_field(key, value) for key, value in metadata.items() if key not in base.fields),
    ]
    offset = 0
    for name, tensor in tensors.items():
        header.append(_encode_tensor(tensor, offset))
        tensors[name] = replace(tensor, start=offset)
        offset = align(offset + tensor.nbytes, alignment)

    pieces: list[tuple[int, bytes | Extent | RouterTensor]] = []
    position = 0
    for piece in header:
        pieces.append((position, piece))
        position += piece.length if isinstance(piece, Extent) else len(piece)
    data_start = align(position, alignment)
    for name, tensor in tensors.items():
        tensors[name] = replace(tensor, start=data_start + tensor.start)
        old = base.tensors[name]
        pieces.append((tensors[name].start, routers[name] if name in routers else Extent(old.start, old.nbytes)))
    return FilePlan(base, target, alignment, data_start + offset, tensors, pieces)


def _encode_text(text: str) -> bytes:
    # A file name that is not UTF-8 can get here as a model's name.
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def _encode_field(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return _encode_text(key) + struct.pack("<I", GGUFValueType.STRING) + _encode_text(value)
    return _encode_text(key) + struct.pack("<II", GGUFValueType.UINT32, value)


def _encode_tensor(tensor: Tensor, offset: int) -> bytes:
    dimensions = len(tensor.shape)
    return _encode_text(tensor.name) + struct.pack(
        f"<I{dimensions}QIQ", dimensions, *tensor.shape, tensor.type.id, offset
    )


def _write(plan: Plan, force: bool, progress: Progress) -> None:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, plan.output_bytes)

    written: list[tuple[Path, os.stat_result]] = []
    try:
        # Outputs get their names in reverse: a split model is complete once the part that one opens is there.
        with ExitStack() as outputs:
            for file in plan.files:
                temporary = outputs.enter_context(atomic_output(file.target, force=force))
                _write_file(file, temporary, advance)
                written.append((file.target, os.stat(temporary)))
            if len(plan.files) > 1:
                # A crash must not leave an older first part that opens newer others.
                refuse_existing(plan.files[0].target, force)
                plan.files[0].target.resolve().unlink(missing_ok=True)
    except BaseException:
        for target, status in written:
            _remove_if_ours(target, status)
        raise


def _remove_if_ours(target: Path, written: os.stat_result) -> None:
    try:
        if os.path.samestat(os.stat(target), written):
            target.resolve().unlink()
    except FileNotFoundError:
        pass


def _write_file(file: FilePlan, path: Path, advance: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with file.base.source.open() as base:
            os.ftruncate(descriptor, file.size)
            position = 0
            for offset, piece in file.pieces:
                advance(offset - position)
                if isinstance(piece, Extent):
                    _copy(file.base.source, base, piece, descriptor, offset, advance)
                    position = offset + piece.length
                else:
                    data = piece if isinstance(piece, bytes) else piece.load().data.cast("B")
                    _write_at(descriptor, offset, data)
                    advance(len(data))
                    position = offset + len(data)
            advance(file.size - position)
        # A disk may report here, and not before, that it is full: it must be known before any output gets its name.
        os.fsync(descriptor)
    except OSError as error:
        raise RemoeError(
            f"{file.target}: cannot be written from {file.base.path.name}: {error.strerror}; nothing was changed"
        ) from error
    finally:
        os.close(descriptor)
    if read_layout(path).tensors != file.tensors:
        raise RemoeError(f"{file.target}: does not read back as it was written; nothing was changed")


def _copy(source: Source, base: int, extent: Extent, target: int, offset: int, advance: Callable[[int], None]) -> None:
    """Copy an extent of the base to `offset`. Holes are skipped: the target is new, so they are holes there, too."""
    position, shift = extent.start, offset - extent.start
    for start, end in _data_ranges(base, extent.start, extent.start + extent.length):
        advance(start - position)
        position = start
        while position < end:
            copied = _copy_in_kernel(base, position, target, position + shift, min(end - position, _KERNEL_CHUNK))
            if not copied:
                data = source.read(base, position, min(end - position, _BUFFER))
                _write_at(target, position + shift, data)
                copied = len(data)
            advance(copied)
            position += copied
    advance(extent.start + extent.length - position)


def _data_ranges(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that are not holes."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
            hole = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if start < end:
            yield start, min(hole, end)
        start = hole


def _copy_in_kernel(base: int, start: int, target: int, offset: int, length: int) -> int:
    """Bytes copied without passing through this process; 0 where the kernel or the filesystem cannot."""
    try:
        return os.copy_file_range(base, target, length, start, offset)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return 0


def _write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = memoryview(data)[written:]
        offset += written
