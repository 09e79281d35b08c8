"""What ``scripts/fuzz.py`` feeds with bytes: each target reads them as a file from a stranger.

A target returns normally, whether the file was read or refused with a RemoeError. Anything else it raises is a finding.
`seeds` are sound files to start from; the corpora in ``tests/data/fuzz`` are what fuzzing made of them.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import gguf_maker as make
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.diff import diff
from remoe_edge.gguf_io.layout import read_layout, read_model
from remoe_edge.gguf_io.router import INDEX_NAME, read_router
from remoe_edge.gguf_io.runnable import check_runnable
from remoe_edge.measure.storage import expert_slices
from remoe_edge.routing import twin as twin_module
from remoe_edge.routing.trace import excerpt, load_trace, reuse_rate, save_trace
from remoe_edge.routing.twin import QUANTS, plan_twin, write_twin
from remoe_edge.runtime.budget import cache_bytes, expert_groups
from remoe_edge.runtime.footprint import footprint

# Outputs are flushed to disk, which takes nearly all of the time elsewhere.
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

CORPORA = Path(__file__).with_name("data") / "fuzz"


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[str | bytes, ...] = ()
    """What its files are made of, to be put in anywhere."""


@contextmanager
def _file(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield path


#
# GGUF: all that reads its header, and the copy
#


def _gguf(content: bytes) -> None:
    with _file("base.gguf", content) as path:
        for read in (
            check_runnable,
            lambda path: cache_bytes(expert_groups(read_model(path)), 2, "lru"),
            lambda path: footprint(read_model(path), 512),
            lambda path: expert_slices(read_model(path)),
            lambda path: diff(path, path),
        ):
            with suppress(RemoeError):
                read(path)
        output = path.with_name("out.gguf")
        try:
            convert(path, None, output, alignment=64)
        except RemoeError:
            return
        before, after, copied = read_layout(path), read_layout(output), output.read_bytes()
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            assert 0 < tensor.start < tensor.end <= len(content)
            new = after.tensors[name]
            assert copied[new.start : new.end] == content[tensor.start : tensor.end]


def _gguf_seeds() -> list[bytes]:
    fields = [
        make.field("general.architecture", GGUFValueType.STRING, make.text("qwen3moe")),
        make.u32_field("general.alignment", 32),
        make.u32_field("qwen3moe.block_count", 2),
        make.u32_field("qwen3moe.expert_count", 2),
        make.u32_field("qwen3moe.embedding_length", 4),
        make.u32_field("qwen3moe.attention.head_count", 1),
        make.array_field("qwen3moe.expert_used_count", GGUFValueType.INT32, 2, struct.pack("<2i", 1, 1)),
        make.array_field("tokenizer.ggml.tokens", GGUFValueType.STRING, 2, make.text("a") + make.text("")),
        make.array_field("tokenizer.ggml.scores", GGUFValueType.FLOAT32, 2, bytes(8)),
    ]
    tensors = [
        make.tensor("token_embd.weight", (4, 2)),
        make.tensor("blk.0.attn_k.weight", (4,), offset=32),
        make.tensor("blk.0.ffn_up_exps.weight", (4, 1, 2), offset=64),
        make.tensor("blk.1.ffn_down_exps.weight", (32, 1, 2), GGMLQuantizationType.Q4_0, offset=96),
    ]
    split = [make.u32_field("split.no", 0), make.u32_field("split.count", 1)]
    return [
        make.gguf(fields, tensors, bytes(range(132))),
        make.gguf(fields[:3], tensors[:1], bytes(32), version=2),
        make.gguf(split, tensors[2:3], bytes(96)),
    ]


#
# routers
#


def _router(content: bytes) -> None:
    with _file("router.safetensors", content) as path:
        try:
            router = read_router(path)
            for tensor in router.tensors.values():
                assert tensor.load().shape == tensor.shape
        except RemoeError:
            pass


def _router_seeds() -> list[bytes]:
    ones = np.ones((2, 4), "<f4").tobytes()
    name = make.HF_ROUTER.format
    return [
        make.safetensors({name(0): ("F32", (2, 4), ones), name(1): ("BF16", (2, 4), ones[:16])}),
        make.safetensors({name(0): ("F16", (4,), bytes(8)), "model.embed.weight": ("I64", (1,), bytes(8))}),
    ]


def _index(content: bytes) -> None:
    with _file(INDEX_NAME, content) as path:
        path.with_name("model.safetensors").write_bytes(_router_seeds()[0])
        with suppress(RemoeError):
            read_router(path.parent)


def _index_seeds() -> list[bytes]:
    names = {make.HF_ROUTER.format(layer): "model.safetensors" for layer in range(2)}
    return [json.dumps({"metadata": {"total_size": 48}, "weight_map": names}).encode()]


#
# traces
#


def _use_trace(path: Path) -> None:
    trace = load_trace(path)
    reuse_rate(trace)
    part = excerpt(trace, sequence=-1) if trace.offs[-2] < trace.tokens else trace
    again = path.with_name("again.npz")
    save_trace(part, again, force=True)
    assert load_trace(again).digest() == part.digest()


def _trace(content: bytes) -> None:
    with _file("trace.npz", content) as path, suppress(RemoeError):
        _use_trace(path)


def _members(content: bytes) -> bytes:
    """An archive with sound checksums of the arrays in `content`, which are apart by a word: fuzzing finds no CRC."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, member in zip(("ids", "offs", "meta", "probs"), content.split(_APART), strict=False):
            file.writestr(f"{name}.npy", member)
    return archive.getvalue()


_APART = b"<APART>"


def _trace_members(content: bytes) -> None:
    _trace(_members(content))


def _arrays(experts: int = 4, **meta: object) -> list[np.ndarray]:
    ids = np.array([[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 1], [2, 1]]], "u1")
    meta = {"experts": experts, "layers": 2, "top_k": 2, "model": "m", "first_token": 3, **meta}
    return [ids, np.array([0, 1, 3]), np.array(json.dumps(meta))]


def _trace_seeds() -> list[bytes]:
    file = io.BytesIO()
    ids, offs, meta = _arrays()
    np.savez(file, ids=ids, offs=offs, meta=meta)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, ids=ids.astype(">u2"), offs=offs, meta=meta, probs=np.zeros((3, 2, 2), "f2"))
    return [file.getvalue(), compressed.getvalue()]


def _member_seeds() -> list[bytes]:
    def encoded(arrays: list[np.ndarray]) -> bytes:
        files = []
        for array in arrays:
            file = io.BytesIO()
            np.lib.format.write_array(file, array, allow_pickle=False)
            files.append(file.getvalue())
        return _APART.join(files)

    return [
        encoded(_arrays()),
        encoded([*_arrays(licence="MIT", source="s", phase="decode"), np.zeros((3, 2, 2), "f4")]),
    ]


def _twin(content: bytes) -> None:
    """A twin of whatever trace can be read; the first byte chooses its kind."""
    # Less random data, which takes most of the time and is not the subject.
    small = patch.object(twin_module, "_POOL_BYTES", 1 << 15)
    with _file("trace.npz", _members(content[1:])) as path, small, suppress(RemoeError):
        trace = load_trace(path)
        choice = content[0]
        twin = plan_twin(
            trace,
            arch=("olmoe", "deepseek2", "qwen3moe", "gpt-oss")[choice % 4],
            quant=list(QUANTS)[choice // 4 % len(QUANTS)],
            hidden=64,
            ff=32,
            layers=1 if choice >= 128 else None,
        )
        if twin.nbytes > 4 << 20:
            return
        write_twin(twin, path.with_name("twin.gguf"))
        layout = read_layout(path.with_name("twin.gguf"))
        assert layout.integer("remoe.twin.steps") == trace.tokens


def _twin_seeds() -> list[bytes]:
    return [bytes([choice]) + seed for seed in _member_seeds() for choice in (0, 5, 130)]


TARGETS = {
    "gguf": Target(
        _gguf,
        _gguf_seeds,
        (
            *("GGUF", "general.architecture", "general.alignment", "qwen3moe", "split.count", "tokenizer.ggml.tokens"),
            *("blk.0.", "blk.99999999999.", "ffn_up_exps.weight", ".expert_used_count", ".block_count"),
            *(struct.pack("<Q", value) for value in (2**63, 2**64 - 1, 2**32, 1 << 20)),
        ),
    ),
    "router": Target(
        _router,
        _router_seeds,
        (
            '"dtype"',
            '"shape"',
            '"data_offsets"',
            "F32",
            "F16",
            "BF16",
            "I64",
            ".mlp.gate.weight",
            "model.layers.0",
            "[]",
        ),
    ),
    "index": Target(_index, _index_seeds, ('"weight_map"', "model.safetensors", "..", "/", "{}", "\\ud800", ".weight")),
    "trace": Target(
        _trace, _trace_seeds, ("PK\x03\x04", "PK\x01\x02", "PK\x05\x06", "ids.npy", "offs.npy", "meta.npy")
    ),
    "trace-members": Target(
        _trace_members,
        _member_seeds,
        (
            _APART,
            b"\x93NUMPY",
            "'descr'",
            "'fortran_order'",
            "True",
            "'shape'",
            "|O",
            "<U9",
            ">u2",
            "<i8",
            "<f2",
            "|u1",
        ),
    ),
    "twin": Target(
        _twin, _twin_seeds, (_APART, b"\x93NUMPY", '"experts"', '"first_token"', '"model"', "\\ud800", "null", "-1")
    ),
}


def corpus(name: str) -> list[bytes]:
    """The seeds of a target and what fuzzing added to them."""
    path = CORPORA / f"{name}.zip"
    kept = []
    if path.exists():
        with zipfile.ZipFile(path) as archive:
            kept = [archive.read(member) for member in archive.namelist()]
    return TARGETS[name].seeds() + kept
