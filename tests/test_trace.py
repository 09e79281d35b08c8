import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.routing import trace as trace_module
from remoe_edge.routing.trace import NOT_COMPUTED, Trace, excerpt, load_trace, packaged_trace, reuse_rate, save_trace


def random_trace(tokens: int, layers: int, experts: int, k: int, seed: int = 0, dtype: str = "u1") -> Trace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :k].astype(dtype)
    return Trace(ids=ids, offs=np.array([0, tokens]), meta={"experts": experts})


def npz(path: Path, **changes: Any) -> Path:
    """A small valid trace, but for ``changes``; None leaves an array out."""
    arrays = {
        "ids": random_trace(5, 3, 8, 2).ids,
        "offs": np.array([0, 2, 5]),
        "meta": np.array(json.dumps({"experts": 8, "layers": 3, "top_k": 2})),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_packaged_trace() -> None:
    trace = packaged_trace()
    assert (trace.tokens, trace.layers, trace.top_k, trace.experts) == (299, 16, 8, 64)
    assert trace.meta["licence"] == "Apache-2.0"
    assert trace.meta["source"] == "sqliteai/waste tests/trace_olmoe_299.jsonl"
    assert trace.computed.all()


def test_loads_what_was_saved(tmp_path: Path) -> None:
    saved = Trace(
        ids=random_trace(7, 2, 40, 4, dtype="u2").ids,
        offs=np.array([0, 3, 3, 7]),
        meta={"experts": 40, "model": "Größe"},
        probs=np.random.default_rng(0).random((7, 2, 4)).astype("f2"),
    )
    save_trace(saved, tmp_path / "t.npz")
    loaded = load_trace(tmp_path / "t.npz")
    assert (loaded.ids == saved.ids).all()
    assert loaded.ids.dtype == np.uint16
    assert loaded.offs.tolist() == [0, 3, 3, 7]
    assert loaded.meta == saved.meta
    assert loaded.probs is not None
    assert (loaded.probs == saved.probs).all()
    assert loaded.digest() == saved.digest()


def test_equal_traces_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        save_trace(packaged_trace(), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_save_refuses_to_overwrite(tmp_path: Path) -> None:
    path = npz(tmp_path / "t.npz")
    before = path.read_bytes()
    with pytest.raises(RemoeError, match="--force"):
        save_trace(packaged_trace(), path)
    assert path.read_bytes() == before
    save_trace(packaged_trace(), path, force=True)
    assert load_trace(path).tokens == 299


def test_big_endian_ids_are_read(tmp_path: Path) -> None:
    ids = random_trace(5, 3, 8, 2).ids
    assert (load_trace(npz(tmp_path / "t.npz", ids=ids.astype(">u4"))).ids == ids).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "has no 'ids'"),
        ({"offs": None}, "has no 'offs'"),
        ({"meta": None}, "has no 'meta'"),
        ({"ids": np.zeros((5, 3, 2))}, "expected unsigned integers"),
        ({"ids": np.zeros((5, 3, 2), "i1")}, "expected unsigned integers"),
        ({"ids": np.zeros((5, 6), "u1")}, "expected unsigned integers"),
        ({"ids": np.zeros((0, 3, 2), "u1")}, "expected unsigned integers"),
        ({"ids": np.full((5, 3, 2), [3, 8], "u1")}, r"token 0, layer 0 names an expert that does not exist.*\[3, 8\]"),
        ({"ids": np.full((5, 3, 2), [3, NOT_COMPUTED], "u2")}, "does not exist"),
        ({"ids": np.full((5, 3, 2), 3, "u1")}, "names an expert twice"),
        ({"offs": np.array([0.0, 5.0])}, "expected integers"),
        ({"offs": np.array([[0, 5]])}, "does not rise from 0"),
        ({"offs": np.array([5])}, "does not rise from 0"),
        ({"offs": np.array([1, 5])}, "does not rise from 0"),
        ({"offs": np.array([0, 4])}, "does not rise from 0"),
        ({"offs": np.array([0, 4, 3, 5])}, "does not rise from 0"),
        ({"offs": np.array([0, -(2**63), 5])}, "does not rise from 0"),
        ({"offs": np.array([0, 2**64 - 1, 5], "u8")}, "does not rise from 0"),
        ({"meta": np.array("not json")}, "is not JSON"),
        ({"meta": np.array("[" * 100_000)}, "is not JSON"),
        # As a string of Python's the first of these ends in a SystemError.
        ({"meta": np.frombuffer(b"\xff" * 8, "<U2").reshape(())}, "is not JSON"),
        ({"meta": np.array('{"experts": 8, "model": "\\ud800"}')}, "is not JSON"),
        ({"meta": np.array('{"experts": 8, "first_token": "x"}')}, "'first_token' in 'meta' is 'x'"),
        ({"meta": np.array('{"experts": 8, "first_token": -1}')}, "'first_token' in 'meta' is -1"),
        ({"meta": np.array("[]")}, "is not a JSON object"),
        ({"meta": np.array(b"{}")}, "expected one string"),
        ({"meta": np.array(["{}"])}, "expected one string"),
        ({"meta": np.array("{}")}, "'experts' in 'meta' is None"),
        ({"meta": np.array('{"experts": 1}')}, "'experts' in 'meta' is 1"),
        ({"meta": np.array('{"experts": true}')}, "'experts' in 'meta' is True"),
        ({"meta": np.array('{"experts": 8, "layers": 4}')}, "'layers' in 'meta' is 4, but 'ids' has 3"),
        ({"meta": np.array('{"experts": 8, "top_k": 4}')}, "'top_k' in 'meta' is 4, but 'ids' has 2"),
        ({"probs": np.zeros((5, 3, 2), "u1")}, "expected floats"),
        ({"probs": np.zeros((5, 3, 1))}, "expected floats"),
        ({"ids": np.array([{}])}, "object"),
    ],
)
def test_refuses_what_is_no_trace(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoeError, match=message):
        load_trace(npz(tmp_path / "t.npz", **changes))


def test_refuses_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"ids")
    with pytest.raises(RemoeError, match=r"t\.npz: not a readable \.npz routing trace"):
        load_trace(path)


def test_refuses_bombs_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_TRACE_BYTES", 1 << 16)
    np.savez_compressed(tmp_path / "t.npz", ids=np.zeros(1 << 20, "u1"), offs=np.zeros(1), meta=np.array("{}"))
    with pytest.raises(RemoeError, match=r"unpacks to 1\.00 MiB, the limit is 64 KiB"):
        load_trace(tmp_path / "t.npz")


def test_refuses_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    npz(tmp_path / "good.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "t.npz", "w") as bad:
        bad.writestr("ids.npy", header.getvalue())
        for name in ("offs.npy", "meta.npy"):
            bad.writestr(name, good.read(name))
    with pytest.raises(RemoeError, match=r"'ids\.npy' declares shape \(1099511627776, 1024\) of uint8"):
        load_trace(tmp_path / "t.npz")


def test_refuses_two_arrays_of_one_name(tmp_path: Path) -> None:
    path = npz(tmp_path / "t.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("ids.npy", archive.read("ids.npy"))
    with pytest.raises(RemoeError, match="holds 'ids' 2 times"):
        load_trace(path)


def test_refuses_an_array_before_the_start(tmp_path: Path) -> None:
    path = npz(tmp_path / "t.npz")
    content = bytearray(path.read_bytes())
    # The directory's size is 12 bytes, its offset 16 bytes into the last record of 22; what is missing in front of the
    # directory is taken from every offset in it.
    size = int.from_bytes(content[-10:-6], "little")
    content[-6:-2] = (len(content) - 22 - size + 1000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(RemoeError, match=r"t\.npz: (is damaged: .* before the start|not a readable)"):
        load_trace(path)


@given(data=st.data())
def test_damaged_files_load_or_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = npz(tmp_path_factory.mktemp("trace") / "t.npz")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        load_trace(path)
    except RemoeError as error:
        message = str(error)
    else:
        return
    assert message.startswith(str(path))


def test_layers_that_were_not_computed() -> None:
    ids = random_trace(4, 2, 8, 2, dtype="u2").ids
    ids[:2, 1] = NOT_COMPUTED
    trace = Trace(ids=ids, offs=np.array([0, 4]), meta={"experts": 8})
    assert trace.computed.tolist() == [[True, False], [True, False], [True, True], [True, True]]
    shared = len(set(ids[2, 1].tolist()) & set(ids[3, 1].tolist()))
    assert reuse_rate(trace).per_layer[1] == shared / 2


def test_reuse_rate_of_one_token_is_unknown() -> None:
    rate = reuse_rate(random_trace(1, 2, 8, 2))
    assert rate.total is None
    assert rate.per_layer == [None, None]


@given(
    tokens=st.integers(2, 30),
    layers=st.integers(1, 3),
    k=st.integers(1, 4),
    cut=st.integers(0, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_reuse_rate_is_the_mean_overlap_within_sequences(tokens: int, layers: int, k: int, cut: int, seed: int) -> None:
    cut = min(cut, tokens)
    ids = random_trace(tokens, layers, 6, k, seed).ids
    trace = Trace(ids=ids, offs=np.array([0, cut, tokens]), meta={"experts": 6})
    overlaps = [
        [len(set(ids[t, layer].tolist()) & set(ids[t - 1, layer].tolist())) / k for t in range(1, tokens) if t != cut]
        for layer in range(layers)
    ]
    rate = reuse_rate(trace)
    if overlaps[0]:
        assert rate.per_layer == pytest.approx([np.mean(layer) for layer in overlaps])
        assert rate.total == pytest.approx(np.mean(overlaps))
    else:
        assert rate.total is None


def test_reuse_rate_of_the_packaged_trace() -> None:
    assert reuse_rate(packaged_trace()).total == pytest.approx(0.43519, abs=1e-5)


def sequences(*lengths: int) -> Trace:
    """Token t chose the experts t and t + 1 (modulo 16) in both layers."""
    tokens = sum(lengths)
    ids = np.stack([np.arange(tokens), np.arange(tokens) + 1], axis=1) % 16
    return Trace(
        ids=np.repeat(ids[:, None], 2, axis=1).astype("u1"),
        offs=np.cumsum([0, *lengths]),
        meta={"experts": 16, "model": "m"},
        probs=np.arange(tokens * 4, dtype=np.float32).reshape(tokens, 2, 2),
    )


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    sequence=st.integers(-7, 7),
    tokens=st.none() | st.integers(0, 40),
)
def test_excerpts_are_slices(lengths: list[int], sequence: int, tokens: int | None) -> None:
    trace = sequences(*lengths)
    known = -len(lengths) <= sequence < len(lengths)
    start = sum(lengths[: sequence % len(lengths)])
    left = trace.tokens - start
    if not known or left == 0 or (tokens is not None and not 0 < tokens <= left):
        with pytest.raises(RemoeError, match=f"has no sequence {sequence}" if not known else f"has {left} tokens from"):
            excerpt(trace, sequence=sequence, tokens=tokens)
        return
    part = excerpt(trace, sequence=sequence, tokens=tokens)
    end = start + (left if tokens is None else tokens)
    assert (part.ids == trace.ids[start:end]).all()
    assert part.probs is not None
    assert (part.probs == trace.probs[start:end]).all()
    # No boundary between tokens is lost, and none is made up.
    inner = {int(edge) - start for edge in trace.offs if start < edge < end}
    assert set(part.offs[1:-1].tolist()) - {0, part.tokens} == inner
    assert int(part.meta.get("first_token", 0)) == start
    assert part.meta["model"] == "m"


def test_excerpts_of_excerpts_know_where_they_are() -> None:
    trace = excerpt(excerpt(sequences(3, 4, 5), sequence=1), sequence=-1, tokens=2)
    assert trace.meta["first_token"] == 7
    assert trace.ids[:, 0, 0].tolist() == [7, 8]
    assert excerpt(trace) is trace
