import hashlib
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from observe import observe_routing, tokenize

from remoe_edge.commands.twin import command
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.blocks import TYPES, random_blocks
from remoe_edge.gguf_io.layout import read_layout
from remoe_edge.routing.shapes import ARCHITECTURES
from remoe_edge.routing.trace import NOT_COMPUTED, Trace, packaged_trace, save_trace
from remoe_edge.routing.twin import QUANTS, orthonormal_rows, plan_twin, step_token, token_steps, write_twin

SMALL = {"layers": 4, "hidden": 256, "ff": 32}
"""Four layers of 64 experts fill a hidden size of 256, which leaves no room for signatures."""


def write(path: Path, trace: Trace | None = None, **options: Any) -> Path:
    write_twin(plan_twin(packaged_trace() if trace is None else trace, **{**SMALL, **options}), path)
    return path


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(np.asarray(t.data), t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
@pytest.mark.parametrize("rms", [1e-3, 1.0])
def test_random_blocks_have_the_moments_asked_for(type_: GGMLQuantizationType, rms: float) -> None:
    values = dequantize(random_blocks(type_, 4000, rms, np.random.default_rng(0)).reshape(4000, -1), type_)
    tolerance = math.sqrt(2) - 1 if type_ == GGMLQuantizationType.MXFP4 else 0.05
    assert np.sqrt(np.mean(np.square(values))) == pytest.approx(rms, rel=tolerance)
    assert abs(values.mean()) < 0.1 * rms
    assert len(np.unique(values)) > 5


@pytest.mark.parametrize(
    "type_", [type_ for type_ in TYPES if type_.name not in ("F32", "MXFP4")], ids=lambda t: t.name
)
def test_random_blocks_have_no_subnormal_scales(type_: GGMLQuantizationType) -> None:
    scales = random_blocks(type_, 4000, 1e-3, np.random.default_rng(0))[:, :2].copy().view(np.float16)
    assert np.abs(scales).min() >= np.finfo(np.float16).smallest_normal
    with pytest.raises(RemoeError, match=f"{type_.name} weights of root mean square 1e-05 would need subnormal"):
        random_blocks(type_, 10, 1e-5, np.random.default_rng(0))


@pytest.mark.parametrize(("count", "size"), [(64, 64), (1024, 2048), (768, 2880)])
def test_rows_are_orthonormal(count: int, size: int) -> None:
    rows = orthonormal_rows(count, size, np.random.default_rng(0))
    assert np.abs(rows @ rows.T - np.eye(count)).max() < 1e-5
    assert np.abs(rows).max() <= math.sqrt(2 / size) + 1e-6


def test_embeddings_choose_what_the_trace_chose(tmp_path: Path) -> None:
    trace = packaged_trace()
    tensors = weights(write(tmp_path / "t.gguf"))
    embeddings = tensors["token_embd.weight"]
    for layer in range(4):
        logits = embeddings @ tensors[f"blk.{layer}.ffn_gate_inp.weight"].T
        chosen = (-logits).argsort(axis=1, kind="stable")[:, :8]
        assert (chosen == trace.ids[token_steps(299), layer]).all()
    following = (embeddings @ tensors["output.weight"].T).argmax(axis=1)
    assert (following == step_token(0) + (token_steps(299) + 1) % 299).all()


def test_signatures_tell_equal_steps_apart(tmp_path: Path) -> None:
    ids = np.tile(np.arange(4, dtype="u1"), (200, 2, 1))
    trace = Trace(ids=ids, offs=np.array([0, 200]), meta={"experts": 16})
    tensors = weights(write(tmp_path / "t.gguf", trace, layers=2))
    logits = (tensors["token_embd.weight"] @ tensors["output.weight"].T)[step_token(0) :, step_token(0) :]
    best, second = -np.sort(-logits, axis=1)[:, :2].T
    assert (logits.argmax(axis=1) == (np.arange(200) + 1) % 200).all()
    assert (best - second).min() > 0.01 * best.max()


@pytest.mark.parametrize("quant", list(QUANTS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_two_experts_have_the_same_bytes(tmp_path: Path, arch: str, quant: str) -> None:
    path = write(tmp_path / "t.gguf", arch=arch, quant=quant, layers=1, ff=256)
    layout = read_layout(path)
    experts = [tensor for name, tensor in layout.tensors.items() if name.endswith("_exps.weight")]
    assert len(experts) == 3
    slices = set()
    for tensor in experts:
        assert tensor.type.name == quant
        data = path.read_bytes()[tensor.start : tensor.end]
        slices |= {hashlib.sha256(part).digest() for part in np.frombuffer(data, "u1").reshape(64, -1)}
    assert len(slices) == 3 * 64


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{number}.gguf", **options).read_bytes()
        for number, options in enumerate([{}, {}, {"seed": 1}])
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_planned_size_is_the_size_of_the_tensors(tmp_path: Path) -> None:
    seen: list[int] = []
    twin = plan_twin(packaged_trace(), **SMALL)
    write_twin(twin, tmp_path / "t.gguf", progress=seen.append)
    assert sum(tensor.nbytes for tensor in read_layout(tmp_path / "t.gguf").tensors.values()) == twin.nbytes
    assert seen == sorted(seen)
    assert seen[-1] == twin.nbytes
    assert 0 < (tmp_path / "t.gguf").stat().st_size - twin.nbytes < 100_000


def test_default_twin_has_the_shape_of_olmoe() -> None:
    assert plan_twin(packaged_trace()).nbytes == pytest.approx(3.8e9, rel=0.01)


def test_metadata_name_the_source(tmp_path: Path) -> None:
    layout = read_layout(write(tmp_path / "t.gguf", seed=7))
    assert layout.text("general.license") == "Apache-2.0"
    assert layout.text("remoe.twin.trace.source") == "sqliteai/waste tests/trace_olmoe_299.jsonl"
    assert layout.text("remoe.twin.trace.sha256") == packaged_trace().digest()
    assert layout.integer("remoe.twin.seed") == 7
    assert layout.integer("olmoe.expert_used_count") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 128}, "4 layers of 64 experts need 256 orthogonal router rows.*no more than 128; use --hidden 256"),
        ({"layers": 17}, "has 16 layers, 17 cannot be replayed"),
        ({"arch": "llama"}, "no twins of architecture 'llama'; use one of olmoe"),
        ({"quant": "Q2_K"}, "no twins of type 'Q2_K'; use one of Q4_0"),
        ({"ff": 33}, "multiples of 64 and of 32"),
        ({"hidden": 300}, "multiples of 64 and of 32"),
        ({"quant": "Q4_K"}, "--ff 32 is not a multiple of 256, the block of Q4_K"),
        ({"quant": "Q4_K", "hidden": 320, "ff": 256}, "--hidden 320 is not a multiple of 256"),
    ],
)
def test_refuses_sizes_that_do_not_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoeError, match=message):
        plan_twin(packaged_trace(), **{**SMALL, **options})


def test_refuses_a_trace_with_gaps() -> None:
    ids = np.tile(np.arange(4, dtype="u2"), (5, 2, 1))
    ids[:2, 1] = NOT_COMPUTED
    with pytest.raises(RemoeError, match="2 of 5 tokens have layers that were not computed"):
        plan_twin(Trace(ids=ids, offs=np.array([0, 5]), meta={"experts": 8}), hidden=64, ff=32)


def test_refuses_a_full_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(RemoeError, match="its filesystem has 1000 B free"):
        write(tmp_path / "t.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(written: int) -> None:
        if written > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_twin(plan_twin(packaged_trace(), **SMALL), tmp_path / "t.gguf", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_command_writes_the_packaged_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    arguments = ["-o", str(path), "--layers", "4", "--hidden", "256", "--ff", "32", "--arch", "qwen3moe"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert re.search(
        r"t\.gguf takes \d+\.\d\d MiB .*\n.*writing 100 %\nWrote .*t\.gguf: 299 steps", result.stderr, re.DOTALL
    )
    content = path.read_bytes()
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, RemoeError)
    assert "--force" in str(result.exception)
    assert path.read_bytes() == content
    assert CliRunner().invoke(command, [*arguments, "--force", "--seed", "1"]).exit_code == 0
    assert path.read_bytes() != content


def test_command_replays_an_excerpt(tmp_path: Path) -> None:
    """A twin of the second sequence, 10 tokens of it, is the twin of these tokens."""
    trace = packaged_trace()
    cut = replace(trace, offs=np.array([0, 100, 299]))
    save_trace(cut, tmp_path / "trace.npz")
    options = ["--layers", "4", "--hidden", "256", "--ff", "32"]
    excerpted = ["--sequence", "-1", "--tokens", "10", "--align", "64"]
    path = tmp_path / "t.gguf"
    result = CliRunner().invoke(command, [str(tmp_path / "trace.npz"), "-o", str(path), *options, *excerpted])
    assert result.exit_code == 0, result.output
    assert "10 steps" in result.stderr
    layout = read_layout(path)
    assert layout.alignment == 64
    assert layout.integer("remoe.twin.steps") == 10
    assert layout.integer("remoe.twin.trace.first_token") == 100
    tensors = weights(path)
    logits = tensors["token_embd.weight"][step_token(0) :] @ tensors["blk.3.ffn_gate_inp.weight"].T
    assert ((-logits).argsort(axis=1, kind="stable")[:, :8] == trace.ids[100:110, 3]).all()
    failed = CliRunner().invoke(
        command, [str(tmp_path / "trace.npz"), "-o", str(tmp_path / "u.gguf"), *options, "--tokens", "300"]
    )
    assert "has 299 tokens from sequence 0 on, 300 of them cannot be taken" in str(failed.exception)


@pytest.mark.parametrize(
    ("arch", "shape", "slice_bytes", "aligned"),
    [
        (
            "deepseek2",
            {"hidden": 2048, "ff": 1408, "quant": "Q4_0", "experts": 64, "top_k": 6, "layers": 26},
            1622016,
            1,
        ),
        (
            "gpt-oss",
            {"hidden": 2880, "ff": 2880, "quant": "MXFP4", "experts": 32, "top_k": 4, "layers": 24},
            4406400,
            0,
        ),
    ],
)
def test_real_shapes_can_be_planned(arch: str, shape: dict[str, Any], slice_bytes: int, aligned: int) -> None:
    experts, top_k, layers = (shape.pop(key) for key in ("experts", "top_k", "layers"))
    ids = np.tile(np.arange(top_k, dtype="u1"), (5, layers, 1))
    twin = plan_twin(Trace(ids=ids, offs=np.array([0, 5]), meta={"experts": experts}), arch=arch, **shape)
    tensor = next(tensor for tensor in twin.tensors if tensor.name == f"blk.{layers - 1}.ffn_up_exps.weight")
    assert tensor.nbytes == experts * slice_bytes
    assert (slice_bytes % twin.alignment == 0) == aligned


@pytest.mark.runtime
@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe"])
def test_decoding_visits_the_traced_experts(tmp_path: Path, arch: str) -> None:
    trace = packaged_trace()
    seen = observe_routing(write(tmp_path / "t.gguf", arch=arch, layers=16, hidden=1024), [step_token(0)], 299)
    assert seen.tokens == [step_token((step + 1) % 299) for step in range(299)]
    assert (seen.ids == trace.ids).all()


@pytest.mark.runtime
@pytest.mark.parametrize("quant", list(QUANTS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_and_type_replays(tmp_path: Path, arch: str, quant: str) -> None:
    trace = packaged_trace()
    model = write(tmp_path / "t.gguf", arch=arch, quant=quant, hidden=512, ff=256 if quant == "Q4_K" else 32)
    seen = observe_routing(model, [step_token(0)], 40)
    assert seen.tokens == [step_token(step + 1) for step in range(40)]
    assert (seen.ids == trace.ids[:40, :4]).all()
    # Attention and experts do something, and not much: a logit is the cosine with the step's own embedding.
    cosines = seen.logits.max(axis=1) / math.sqrt(512)
    assert 0.99 < cosines.min() < 0.99999


@pytest.mark.runtime
def test_text_addresses_steps(tmp_path: Path) -> None:
    trace = packaged_trace()
    model = write(tmp_path / "t.gguf", hidden=512)
    prompt = tokenize(model, "".join(f"w{step:05d}" for step in range(100, 164)))
    assert prompt == [step_token(step) for step in range(100, 164)]
    seen = observe_routing(model, prompt, 2, ubatch=7)
    assert (seen.ids[:64, :3] == trace.ids[100:164, :3]).all()
    assert (seen.ids[-1] == trace.ids[164, :4]).all()
    assert seen.tokens == [step_token(164), step_token(165)]
    # Other text stands for steps, byte by byte; BOS for the last one.
    last = token_steps(299)[tokenize(model, "Hello")[-1]]
    assert observe_routing(model, tokenize(model, "Hello"), 1).tokens == [step_token(last + 1)]
    assert observe_routing(model, [1], 1).tokens == [step_token(0)]
