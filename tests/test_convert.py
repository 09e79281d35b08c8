"""`convert` replaces the router and nothing else, refuses bad input with nothing written, and `diff` tells the rest."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf_maker as make
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from remoe_edge import __version__
from remoe_edge.commands.convert import command
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert, plan_conversion
from remoe_edge.gguf_io.diff import diff
from remoe_edge.gguf_io.layout import read_layout, read_model
from remoe_edge.gguf_io.router import gguf_router_name
from remoe_edge.sizes import format_size


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.write_base(tmp_path / "base.gguf")


@pytest.fixture
def router(tmp_path: Path) -> Path:
    return make.write_router(tmp_path / "router.safetensors", make.router_values())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def data_by_name(*paths: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for path in paths for tensor in GGUFReader(path).tensors}


def refused(message: str, base: Path, router: Path, out: Path, *, force: bool = False) -> None:
    """Both a dry run and a conversion are refused, and the folder is as it was."""
    before = {path: path.stat() for path in out.parent.rglob("*")}
    for attempt in plan_conversion, convert:
        with pytest.raises(RemoeError, match=message):
            attempt(base, router, out, force=force)
    after = {path: path.stat() for path in out.parent.rglob("*")}
    assert before.keys() == after.keys()
    for path, status in before.items():
        assert (after[path].st_ino, after[path].st_size, after[path].st_mtime_ns) == (
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
        )


def test_replaces_the_router_and_nothing_else(base: Path, router: Path, out: Path) -> None:
    plan = convert(base, router, out)
    old, new = data_by_name(base), data_by_name(out)
    expected = {make.ROUTER.format(i): make.random_values(100 + i, make.EXPERTS, make.HIDDEN) for i in range(3)}
    assert list(old) == list(new)
    for name in old:
        assert new[name] == (expected[name].tobytes() if name in expected else old[name]), name
    assert [r.new.name for r in plan.replacements] == list(expected)
    assert plan.kept == []
    assert plan.output_bytes == out.stat().st_size
    assert plan.copied_bytes == sum(len(data) for name, data in old.items() if name not in expected)


def test_lays_tensors_out_as_llama_cpp_demands(tmp_path: Path, router: Path, out: Path) -> None:
    base = make.write_base(tmp_path / "base.gguf", alignment=64)
    content = base.read_bytes()
    convert(base, router, out)
    layout = read_layout(out)
    position = min(tensor.start for tensor in layout.tensors.values())
    assert position % 64 == 0
    for tensor in layout.tensors.values():
        assert tensor.start == position
        position += -(-tensor.nbytes // 64) * 64
    assert position == out.stat().st_size
    assert base.read_bytes() == content


def test_closes_gaps_and_keeps_the_order(tmp_path: Path, out: Path) -> None:
    router = make.write_router(tmp_path / "r.safetensors", {make.HF_ROUTER.format(0): make.random_values(1, 2, 4)})
    base = tmp_path / "base.gguf"
    entries = [make.tensor("z", (4,), offset=512), make.tensor(make.ROUTER.format(0), (4, 2), offset=128)]
    base.write_bytes(make.gguf(tensors=entries, data=bytes(512) + b"0123456789abcdef"))
    convert(base, router, out)
    layout = read_layout(out)
    assert list(layout.tensors) == ["z", make.ROUTER.format(0)]
    assert data_by_name(out)["z"] == b"0123456789abcdef"
    assert out.stat().st_size == min(t.start for t in layout.tensors.values()) + 64


def test_writes_provenance(base: Path, router: Path, out: Path) -> None:
    convert(base, router, out)
    fields = GGUFReader(out).fields
    digest = hashlib.sha256()
    for layer in range(3):
        values = make.random_values(100 + layer, make.EXPERTS, make.HIDDEN)
        digest.update(make.ROUTER.format(layer).encode() + b"\0" + values.tobytes())
    assert {
        key: fields[key].contents() for key in fields if key.startswith(("remoe.", "general.base", "general.f"))
    } == {
        "general.finetune": "ReMoE",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny",
        "remoe.router.sha256": digest.hexdigest(),
        "remoe.tool.version": __version__,
    }
    before = GGUFReader(base).fields
    for key in before.keys() - {"GGUF.kv_count"}:
        assert fields[key].contents() == before[key].contents(), key


def test_keeps_what_the_base_says_of_its_origin(tmp_path: Path, router: Path, out: Path) -> None:
    origin: dict[str, str | int] = {
        "general.base_model.count": 1,
        "general.base_model.0.name": "Older",
        "general.finetune": "Instruct",
    }
    convert(make.write_base(tmp_path / "base.gguf", metadata=origin), router, out)
    layout = read_layout(out)
    assert layout.text("general.base_model.0.name") == "Older"
    assert layout.text("general.finetune") == "Instruct-ReMoE"


def test_names_the_base_by_its_file_when_it_has_no_name(tmp_path: Path, out: Path) -> None:
    router = make.write_router(tmp_path / "r.safetensors", {make.HF_ROUTER.format(0): make.random_values(1, 2, 4)})
    base = tmp_path / "n\udcffm.gguf"
    base.write_bytes(make.gguf(tensors=[make.tensor(make.ROUTER.format(0), (4, 2))], data=bytes(32)))
    convert(base, router, out)
    assert read_layout(out).text("general.base_model.0.name") == "n?m"


def test_same_inputs_give_the_same_bytes_also_when_converted_again(base: Path, router: Path, tmp_path: Path) -> None:
    first, second, again = tmp_path / "1.gguf", tmp_path / "2.gguf", tmp_path / "3.gguf"
    convert(base, router, first)
    convert(base, router, second)
    convert(first, router, again)
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_routers_become_f32_exactly(base: Path, tmp_path: Path, out: Path, dtype: str) -> None:
    values = make.router_values()
    values[make.HF_ROUTER.format(1)][0, :4] = [0.0, -0.0, 2.0**-20, -65504.0]
    convert(base, make.write_router(tmp_path / "half.safetensors", values, dtype), out)
    for layer in range(3):
        stored = values[make.HF_ROUTER.format(layer)]
        if dtype == "F16":
            expected = stored.astype(np.float16).astype(np.float32)
        else:
            expected = (stored.view(np.uint32) & 0xFFFF0000).view(np.float32)
        assert data_by_name(out)[make.ROUTER.format(layer)] == expected.tobytes()


@pytest.mark.parametrize("router_type", ["F16", "BF16", "Q8_0"])
def test_the_router_is_f32_whatever_it_was(tmp_path: Path, router: Path, out: Path, router_type: str) -> None:
    base = make.write_base(tmp_path / "half.gguf", router_type=GGMLQuantizationType[router_type])
    plan = convert(base, router, out)
    assert {(r.old.type.name, r.new.type.name) for r in plan.replacements} == {(router_type, "F32")}
    old, new = data_by_name(base), data_by_name(out)
    for name in old:
        if "ffn_gate_inp" not in name:
            assert new[name] == old[name], name
    for layer in range(3):
        expected = make.random_values(100 + layer, make.EXPERTS, make.HIDDEN)
        assert new[make.ROUTER.format(layer)] == expected.tobytes()


def test_biases_are_replaced_when_the_router_has_them(tmp_path: Path, out: Path) -> None:
    base = make.write_base(tmp_path / "base.gguf", router_bias=True, selection_bias=True)
    values = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp"
        values[f"{prefix}.router.weight"] = make.random_values(100 + layer, make.EXPERTS, make.HIDDEN)
        values[f"{prefix}.router.bias"] = make.random_values(200 + layer, make.EXPERTS)
        values[f"{prefix}.gate.e_score_correction_bias"] = make.random_values(300 + layer, make.EXPERTS)
    plan = convert(base, make.write_router(tmp_path / "r.safetensors", values), out)
    assert len(plan.replacements) == 9
    new = data_by_name(out)
    for layer in range(3):
        assert new[f"blk.{layer}.ffn_gate_inp.bias"] == values[f"model.layers.{layer}.mlp.router.bias"].tobytes()
        correction = values[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert new[f"blk.{layer}.exp_probs_b.bias"] == correction.tobytes()


def test_biases_are_kept_when_the_router_has_none(tmp_path: Path, router: Path, out: Path) -> None:
    base = make.write_base(tmp_path / "base.gguf", selection_bias=True)
    plan = convert(base, router, out)
    assert plan.kept == [f"blk.{layer}.exp_probs_b.bias" for layer in range(3)]
    for name in plan.kept:
        assert data_by_name(out)[name] == data_by_name(base)[name]


def test_prediction_layers_may_be_missing(tmp_path: Path, out: Path) -> None:
    metadata: dict[str, str | int] = {"qwen3moe.nextn_predict_layers": 1}
    base = make.write_base(tmp_path / "base.gguf", metadata=metadata)
    router = make.write_router(tmp_path / "r.safetensors", make.router_values(2))
    plan = convert(base, router, out)
    assert plan.kept == [make.ROUTER.format(2)]
    full = make.write_router(tmp_path / "full.safetensors", make.router_values(3))
    assert len(plan_conversion(base, full, out, force=True).replacements) == 3


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.3.mlp.gate.weight", "blk.3.ffn_gate_inp.weight"),
        ("model.layers.12.mlp.router.weight", "blk.12.ffn_gate_inp.weight"),
        ("model.layers.12.mlp.router.bias", "blk.12.ffn_gate_inp.bias"),
        ("model.layers.0.block_sparse_moe.gate.weight", "blk.0.ffn_gate_inp.weight"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "blk.0.exp_probs_b.bias"),
        ("model.layers.0.mlp.gate.e_score_correction.bias", "blk.0.exp_probs_b.bias"),
        ("model.language_model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"),
        ("language_model.model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"),
        ("base_model.model.model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"),
        ("module.model.layers.7.mlp.gate.weight", "blk.7.ffn_gate_inp.weight"),
        ("mtp.layers.0.mlp.gate.weight", None),
        ("model.layers.0.mlp.shared_expert_gate.weight", None),
        ("model.layers.0.mlp.experts.5.gate_proj.weight", None),
        ("model.layers.0.mlp.gate.lora_A.weight", None),
        ("model.visual.layers.0.mlp.gate.weight", None),
        ("model.layers.-1.mlp.gate.weight", None),
        ("model.layers.9999999999.mlp.gate.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_router_names(key: str, name: str | None) -> None:
    assert gguf_router_name(key) == name


def hf_folder(folder: Path) -> Path:
    """A checkpoint of three files, of which the last has no router and is not there."""
    folder.mkdir()
    weight_map = {"model.norm.weight": "model-00003-of-00003.safetensors"}
    for layer, (key, values) in enumerate(make.router_values().items()):
        name = f"model-0000{1 + layer % 2}-of-00003.safetensors"
        weight_map[key] = name
        tensors = make.router_values() | {f"mtp.layers.{layer}.mlp.gate.weight": values}
        kept = {k: v for k, v in tensors.items() if k.startswith("mtp") or int(k.split(".")[2]) % 2 == layer % 2}
        make.write_router(folder / name, kept, "BF16")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_checkpoint_folder_is_read_where_its_routers_are(base: Path, tmp_path: Path, out: Path) -> None:
    plan = convert(base, hf_folder(tmp_path / "hf"), out)
    assert {r.router.source.path.name for r in plan.replacements} == {
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    }


def test_a_folder_without_an_index_is_read_whole(base: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for layer, (key, values) in enumerate(make.router_values().items()):
        make.write_router(folder / f"{layer}.safetensors", {key: values})
    assert len(convert(base, folder, out).replacements) == 3


class TestRefusals:
    """One test for each thing that `convert` refuses; `refused` also looks that nothing was written."""

    def test_the_output_is_the_input(self, base: Path, router: Path) -> None:
        refused("base.gguf: is the same file as the input", base, router, base, force=True)
        refused("is the same file as the input .*base.gguf", base, router, base)

    def test_the_output_is_a_link_to_the_input(self, base: Path, router: Path, tmp_path: Path) -> None:
        soft, hard = tmp_path / "soft.gguf", tmp_path / "hard.gguf"
        soft.symlink_to(base)
        hard.hardlink_to(base)
        for link in soft, hard:
            refused("is the same file as the input .*base.gguf", base, router, link, force=True)

    def test_the_output_is_the_router(self, base: Path, router: Path) -> None:
        refused("is the same file as the input .*router.safetensors", base, router, router, force=True)

    def test_the_output_is_a_part_of_the_input(self, router: Path, tmp_path: Path) -> None:
        base = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
        for name in "m.gguf", "m-00001-of-00003.gguf", "m-00002-of-00003.gguf":
            refused("m-00001-of-00003.gguf: is the same file as the input", base, router, tmp_path / name, force=True)

    def test_the_output_exists(self, base: Path, router: Path, out: Path) -> None:
        out.write_text("precious")
        refused("out.gguf exists; pass --force to overwrite", base, router, out)
        convert(base, router, out, force=True)
        assert len(read_layout(out).tensors) == len(read_layout(base).tensors)

    def test_the_output_is_a_folder(self, base: Path, router: Path, tmp_path: Path) -> None:
        (tmp_path / "folder.gguf").mkdir()
        refused("is not a regular file", base, router, tmp_path / "folder.gguf", force=True)

    def test_there_is_no_folder_for_the_output(self, base: Path, router: Path, tmp_path: Path) -> None:
        refused("its folder does not exist; create it", base, router, tmp_path / "none" / "out.gguf")

    def test_missing_layers(self, base: Path, tmp_path: Path, out: Path) -> None:
        values = make.router_values()
        del values[make.HF_ROUTER.format(0)], values[make.HF_ROUTER.format(2)]
        router = make.write_router(tmp_path / "r.safetensors", values)
        message = r"r.safetensors: has no ffn_gate_inp.weight for layers 0, 2, where base.gguf has one"
        refused(message, base, router, out)

    def test_surplus_layers(self, base: Path, tmp_path: Path, out: Path) -> None:
        router = make.write_router(tmp_path / "r.safetensors", make.router_values(14))
        message = (
            "has a surplus ffn_gate_inp.weight for layers 3, 4, 5, 6, 7, 8, 9, 10, 3 more, where base.gguf has none"
        )
        refused(message, base, router, out)

    def test_a_surplus_bias(self, base: Path, tmp_path: Path, out: Path) -> None:
        values = make.router_values() | {"model.layers.1.mlp.gate.bias": make.random_values(1, make.EXPERTS)}
        router = make.write_router(tmp_path / "r.safetensors", values)
        refused("has a surplus ffn_gate_inp.bias for layer 1, where base.gguf has none", base, router, out)

    def test_biases_of_some_layers_only(self, tmp_path: Path, out: Path) -> None:
        base = make.write_base(tmp_path / "base.gguf", selection_bias=True)
        bias = {"model.layers.1.mlp.gate.e_score_correction_bias": make.random_values(1, make.EXPERTS)}
        router = make.write_router(tmp_path / "r.safetensors", make.router_values() | bias)
        refused("has no exp_probs_b.bias for layers 0, 2, where base.gguf has one", base, router, out)

    @pytest.mark.parametrize("shape", [(32, 16), (16, 31), (17, 32), (512,), (1, 16, 32)])
    def test_a_wrong_shape(self, base: Path, tmp_path: Path, out: Path, shape: tuple[int, ...]) -> None:
        values = make.router_values() | {make.HF_ROUTER.format(1): make.random_values(1, *shape)}
        router = make.write_router(tmp_path / "r.safetensors", values)
        message = f"'model.layers.1.mlp.gate.weight' has shape {list(shape)}, expected [16, 32] for blk.1.ffn_gate_inp"
        refused(re.escape(message), base, router, out)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    def test_nan_and_infinity(self, base: Path, tmp_path: Path, out: Path, value: float, dtype: str) -> None:
        values = make.router_values()
        values[make.HF_ROUTER.format(2)][5, 7] = value
        router = make.write_router(tmp_path / "r.safetensors", values, dtype)
        refused(rf"tensor 'model.layers.2.mlp.gate.weight' has {value} at \[5, 7\]", base, router, out)

    def test_another_dtype(self, base: Path, tmp_path: Path, out: Path) -> None:
        router = make.write_router(tmp_path / "r.safetensors", make.router_values(), "F64")
        refused("gate.weight' is F64, expected one of F32, F16, BF16", base, router, out)

    def test_two_names_for_one_router(self, base: Path, tmp_path: Path, out: Path) -> None:
        twice = {"model.language_model.layers.1.mlp.gate.weight": make.random_values(1, make.EXPERTS, make.HIDDEN)}
        router = make.write_router(tmp_path / "r.safetensors", make.router_values() | twice)
        refused("is the same router, blk.1.ffn_gate_inp.weight, as 'model", base, router, out)

    def test_a_base_without_experts(self, router: Path, tmp_path: Path, out: Path) -> None:
        base = tmp_path / "dense.gguf"
        base.write_bytes(make.gguf(tensors=[make.tensor("output.weight", (8,))], data=bytes(32)))
        refused("dense.gguf: has no router tensor .* not a Mixture-of-Experts model", base, router, out)

    def test_a_base_that_is_not_gguf(self, router: Path, out: Path) -> None:
        refused("router.safetensors: not a GGUF file", router, router, out)

    def test_a_missing_base(self, router: Path, tmp_path: Path, out: Path) -> None:
        refused("none.gguf: cannot be read: No such file", tmp_path / "none.gguf", router, out)

    def test_a_truncated_base(self, base: Path, router: Path, out: Path) -> None:
        os.truncate(base, base.stat().st_size - 100)
        refused("base.gguf: tensor 'blk.2.ffn_down_exps.weight' takes bytes .* truncated", base, router, out)
        os.truncate(base, 1000)
        refused("base.gguf: metadata key .* the file ends after .* truncated", base, router, out)

    def test_a_tensor_outside_the_file(self, router: Path, tmp_path: Path, out: Path) -> None:
        base = tmp_path / "outside.gguf"
        tensors = [make.tensor(make.ROUTER.format(0), (32, 16)), make.tensor("leak", (8,), offset=1 << 40)]
        base.write_bytes(make.gguf(tensors=tensors, data=bytes(4096)))
        refused("tensor 'leak' takes bytes .* but the file has 4224", base, router, out)

    def test_a_missing_part(self, router: Path, tmp_path: Path, out: Path) -> None:
        base = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
        (tmp_path / "m-00003-of-00003.gguf").unlink()
        refused("m-00003-of-00003.gguf: part 3 of 3 is missing", base, router, out)

    def test_an_output_named_like_parts_of_another_number(self, base: Path, router: Path, tmp_path: Path) -> None:
        split = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
        output = tmp_path / "o-00001-of-00002.gguf"
        refused("is named like one of 2 parts, but the base is one file; rename it", base, router, output)
        refused("is named like one of 2 parts, but the base is 3 parts; rename it", split, router, output)

    def test_a_missing_router(self, base: Path, tmp_path: Path, out: Path) -> None:
        refused("none.safetensors: cannot be read: No such file", base, tmp_path / "none.safetensors", out)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\xff" * 9, b"GGUF" + bytes(9), bytes([2]) + bytes(7) + b"[]"],
        ids=["empty", "noise", "gguf", "list"],
    )
    def test_a_router_that_is_not_safetensors(self, base: Path, tmp_path: Path, out: Path, content: bytes) -> None:
        router = tmp_path / "r.safetensors"
        router.write_bytes(content)
        refused("r.safetensors: not a sound safetensors file", base, router, out)

    def test_a_truncated_router(self, base: Path, router: Path, out: Path) -> None:
        os.truncate(router, router.stat().st_size - 1)
        refused("router.safetensors: not a sound safetensors file", base, router, out)

    def test_a_pickle(self, base: Path, tmp_path: Path, out: Path) -> None:
        pickle = tmp_path / "pytorch_model.bin"
        pickle.write_bytes(b"\x80\x04.")
        refused("pytorch_model.bin: pickled checkpoints are not read.*safetensors.torch.save_file", base, pickle, out)
        refused("has no .safetensors file; pickled checkpoints are not read", base, tmp_path, out)

    def test_a_folder_without_a_checkpoint(self, base: Path, tmp_path: Path, out: Path) -> None:
        (tmp_path / "hf").mkdir()
        refused("hf: has no .safetensors file$", base, tmp_path / "hf", out)

    def test_a_checkpoint_without_routers(self, base: Path, tmp_path: Path, out: Path) -> None:
        router = make.write_router(tmp_path / "r.safetensors", {"lm_head.weight": make.random_values(1, 2, 2)})
        refused("r.safetensors: has no router tensor; expected names such as", base, router, out)

    def test_a_missing_checkpoint_file(self, base: Path, tmp_path: Path, out: Path) -> None:
        folder = hf_folder(tmp_path / "hf")
        (folder / "model-00002-of-00003.safetensors").unlink()
        refused("model-00002-of-00003.safetensors: is missing, but .* holds router tensors", base, folder, out)

    def test_a_checkpoint_file_without_its_tensor(self, base: Path, tmp_path: Path, out: Path) -> None:
        folder = hf_folder(tmp_path / "hf")
        make.write_router(folder / "model-00002-of-00003.safetensors", {"other": make.random_values(1, 2)})
        refused("00002.*has no tensor 'model.layers.1.mlp.gate.weight', which .* says is here", base, folder, out)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{", "index.json: not valid JSON"),
            ("[" * 100_000, "index.json: not valid JSON"),
            ("[]", "index.json: not a JSON object"),
            ("{}", "index.json: has no 'weight_map' object"),
            ('{"weight_map": {"a": "../b.safetensors"}}', "places tensor 'a' in '../b.safetensors'"),
            ('{"weight_map": {"a": "/etc/passwd"}}', "places tensor 'a' in '/etc/passwd'"),
            ('{"weight_map": {"a": 7}}', "places tensor 'a' in 7, which is not the name"),
        ],
    )
    def test_a_bad_index(self, base: Path, tmp_path: Path, out: Path, index: str, message: str) -> None:
        folder = hf_folder(tmp_path / "hf")
        (folder / "model.safetensors.index.json").write_text(index)
        refused(message, base, folder, out)

    def test_no_space(self, base: Path, router: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = shutil.disk_usage(base)._replace(free=5000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        refused(f"{out.parent}: has 4.88 KiB free, but the output needs .* KiB; free some space", base, router, out)


def split_output(folder: Path, prefix: str) -> list[Path]:
    return sorted(folder.glob(f"{prefix}-0*.gguf"))


@pytest.mark.parametrize("name", ["o.gguf", "o-00001-of-00003.gguf", "o-00003-of-00003.gguf"])
@pytest.mark.parametrize("part", [1, 2])
def test_split_in_split_out(router: Path, tmp_path: Path, name: str, part: int) -> None:
    make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
    convert(tmp_path / f"m-0000{part}-of-00003.gguf", router, tmp_path / name)
    inputs, outputs = split_output(tmp_path, "m"), split_output(tmp_path, "o")
    assert [path.name for path in outputs] == [f"o-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for old, new in zip(inputs, outputs, strict=True):
        assert list(data_by_name(old)) == list(data_by_name(new))
    old_data, new_data = data_by_name(*inputs), data_by_name(*outputs)
    changed = {name for name in old_data if old_data[name] != new_data[name]}
    assert changed == {make.ROUTER.format(layer) for layer in range(3)}
    layouts = read_model(outputs[1])
    assert layouts[0].text("general.base_model.0.name") == "Tiny"
    assert "remoe.tool.version" not in layouts[1].fields


def test_a_split_output_appears_whole_or_not_at_all(router: Path, tmp_path: Path) -> None:
    base = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)

    # The first part gets its name last. Something that stands there by then must not leave the others behind.
    def obstruct(done: int, total: int) -> None:
        (tmp_path / "o-00001-of-00003.gguf").mkdir(exist_ok=True)

    with pytest.raises(RemoeError, match=r"o-00001-of-00003\.gguf is not a regular file"):
        convert(base, router, tmp_path / "o.gguf", progress=obstruct)
    assert [path.name for path in split_output(tmp_path, "o")] == ["o-00001-of-00003.gguf"]
    assert not list(tmp_path.glob(".*"))


def test_progress_reaches_the_output_size(base: Path, router: Path, out: Path) -> None:
    reports: list[tuple[int, int]] = []
    convert(base, router, out, progress=lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert reports[-1] == (out.stat().st_size, out.stat().st_size)


def test_a_base_that_changes_under_the_copy_is_an_error(base: Path, router: Path, out: Path) -> None:
    def change(done: int, total: int) -> None:
        os.truncate(base, 3000)

    with pytest.raises(RemoeError, match=r"base\.gguf: (changed while it was being read|ends at offset 3000)"):
        convert(base, router, out, progress=change)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


def test_copies_without_help_of_the_kernel(
    base: Path, router: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(base, router, out)

    def unsupported(*arguments: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    convert(base, router, tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == out.read_bytes()


def test_a_full_disk_leaves_the_old_output(base: Path, router: Path, out: Path) -> None:
    out.write_text("precious")
    limit = base.stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "-m", "remoe_edge", "convert", base, router, "-o", out, "--force"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"Error: {out}: cannot be written from base.gguf: File too large; nothing was changed\n" in done.stderr
    assert out.read_text() == "precious"
    assert not list(out.parent.glob(".*"))


def test_a_killed_run_leaves_the_old_output(base: Path, router: Path, out: Path) -> None:
    out.write_text("precious")
    program = """
        import sys, time
        from pathlib import Path
        from remoe_edge.gguf_io.convert import convert

        def pause(done, total):
            if done > total // 2:
                print(done, flush=True)
                time.sleep(60)

        convert(*map(Path, sys.argv[1:]), force=True, progress=pause)
    """
    command_line = [sys.executable, "-c", textwrap.dedent(program), base, router, out]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
    assert out.read_text() == "precious"
    (leftover,) = set(out.parent.iterdir()) - {base, router, out}
    assert leftover.name.startswith(f".{out.name}.tmp-")
    convert(base, router, out, force=True)
    assert len(read_layout(out).tensors) == len(read_layout(base).tensors)
    assert set(out.parent.iterdir()) == {base, router, out}


BIG = 20 << 30


@pytest.mark.parametrize("kernel_copy", [True, False])
def test_memory_stays_bounded_for_a_file_of_20_gb(tmp_path: Path, out: Path, kernel_copy: bool) -> None:
    """A sparse base with data here and there, a long header and a large router."""
    tensor_bytes = BIG // 3 // 288 * 288 + 288
    rows = tensor_bytes // 144
    strings = b"".join(make.text(f"token {i}") for i in range(250_000))
    names = [f"blk.{i}.ffn_{kind}_exps.weight" for i, kind in enumerate(("gate", "up", "down"))]
    tensors = [make.tensor(name, (256, rows), 2, i * tensor_bytes) for i, name in enumerate(names)]
    tensors.append(make.tensor(make.ROUTER.format(0), (2048, 4096), 0, 3 * tensor_bytes))
    base = tmp_path / "big.gguf"
    base.write_bytes(make.gguf([make.array_field("tokenizer.ggml.tokens", 8, 250_000, strings)], tensors))
    start = base.stat().st_size
    os.truncate(base, start + 3 * tensor_bytes + 2048 * 4096 * 4)
    island = os.urandom(48 << 20)
    with base.open("r+b") as file:
        for position in start, start + tensor_bytes + 12345, start + 3 * tensor_bytes - len(island):
            file.seek(position)
            file.write(island)
    router = make.write_router(
        tmp_path / "r.safetensors", {make.HF_ROUTER.format(0): np.ones((4096, 2048), np.float32)}
    )
    program = f"""
        import errno, os, sys
        from pathlib import Path
        from remoe_edge.gguf_io.convert import convert

        def unsupported(*arguments):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        if not {kernel_copy}:
            os.copy_file_range = unsupported
        convert(*map(Path, sys.argv[1:]))
        # Not ru_maxrss: a child starts with its parent's.
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), base, router, out], stdout=subprocess.PIPE, check=True
    )
    assert int(done.stdout) * 1024 < 300_000_000
    assert out.stat().st_size > BIG
    layout = read_layout(out)
    with out.open("rb") as result:
        for position, name in (0, names[0]), (12345, names[1]), (tensor_bytes - len(island), names[2]):
            result.seek(layout.tensors[name].start + position)
            assert result.read(len(island)) == island
        result.seek(layout.tensors[make.ROUTER.format(0)].start)
        assert result.read(4) == np.float32(1).tobytes()
    assert out.stat().st_blocks * 512 < 1 << 30


# diff


def test_equal_models_have_no_difference(base: Path, tmp_path: Path) -> None:
    split = make.write_base(tmp_path / "m.gguf", tensors_per_part=4)
    assert diff(base, base).tensors == diff(base, base).metadata == []
    parts = diff(base, split)
    assert (parts.tensors, parts.equal_tensors) == ([], len(read_layout(base).tensors))
    assert {entry.key for entry in parts.metadata} == {"split.no", "split.count", "split.tensors.count"}


def test_diff_measures_the_router(base: Path, router: Path, out: Path) -> None:
    convert(base, router, out)
    difference = diff(base, out)
    assert [tensor.name for tensor in difference.tensors] == [make.ROUTER.format(layer) for layer in range(3)]
    for layer, tensor in enumerate(difference.tensors):
        a = make.random_values(30 + layer, make.EXPERTS, make.HIDDEN).astype(np.float64)
        b = make.random_values(100 + layer, make.EXPERTS, make.HIDDEN).astype(np.float64)
        assert tensor.max_abs == np.abs(b - a).max()
        assert tensor.relative_l2 == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
        pairs = zip(data_by_name(base)[tensor.name], data_by_name(out)[tensor.name], strict=True)
        assert tensor.differing_bytes == sum(x != y for x, y in pairs)
    assert {entry.key for entry in difference.metadata} == {
        "general.finetune",
        "general.base_model.count",
        "general.base_model.0.name",
        "remoe.router.sha256",
        "remoe.tool.version",
    }
    assert all(entry.a is None for entry in difference.metadata)


def test_diff_dequantizes(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = bytearray(base.read_bytes())
    experts = read_layout(base).tensors["blk.1.ffn_down_exps.weight"]
    content[experts.start + 5] ^= 0xF0
    other.write_bytes(content)
    (tensor,) = diff(base, other).tensors
    a, b = (
        dequantize(np.frombuffer(data[experts.start : experts.end], np.uint8), GGMLQuantizationType.Q4_0)
        for data in (base.read_bytes(), content)
    )
    assert (tensor.name, tensor.differing_bytes) == ("blk.1.ffn_down_exps.weight", 1)
    assert tensor.max_abs == pytest.approx(float(np.abs(b - a).max()))
    assert tensor.relative_l2 == pytest.approx(float(np.linalg.norm(b - a) / np.linalg.norm(a)))


def test_diff_compares_types_and_shapes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tensors = [make.tensor("only_a", (1,)), make.tensor("type", (8,), 0, 32), make.tensor("shape", (4, 2), 0, 64)]
    a.write_bytes(make.gguf([make.u32_field("n", 1)], tensors, bytes(32) + np.ones(8, "<f4").tobytes() + bytes(32)))
    tensors = [make.tensor("type", (8,), 1), make.tensor("shape", (8,), 0, 32), make.tensor("only_b", (1,), 0, 64)]
    half = np.full(8, 1.5, "<f2").tobytes() + bytes(16)
    b.write_bytes(make.gguf([make.field("n", 8, make.text("x" * 200))], tensors, half + bytes(64)))
    difference = diff(a, b)
    rows = [(t.name, t.type_a, t.type_b, t.shape_a, t.shape_b, t.max_abs, t.relative_l2) for t in difference.tensors]
    assert rows == [
        ("only_a", "F32", None, (1,), None, None, None),
        ("type", "F32", "F16", (8,), (8,), 0.5, 0.5),
        ("shape", "F32", "F32", (4, 2), (8,), None, None),
        ("only_b", None, "F32", None, (1,), None, None),
    ]
    assert [t.differing_bytes for t in difference.tensors] == [None] * 4
    assert [(entry.key, entry.a, entry.b) for entry in difference.metadata] == [
        ("n", "1", f"'{'x' * 100}'... (200 bytes)")
    ]


def test_diff_has_no_number_where_there_is_none(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tensors = [make.tensor("nan", (2,)), make.tensor("q8_k", (256,), GGMLQuantizationType.Q8_K, 32)]
    a.write_bytes(make.gguf(tensors=tensors, data=bytes(32 + 292)))
    nan = np.array([np.nan, 1], "<f4").tobytes()
    b.write_bytes(make.gguf(tensors=tensors, data=nan + bytes(24) + b"\1" + bytes(291)))
    for tensor in diff(a, b).tensors:
        assert tensor.differing_bytes
        assert (tensor.max_abs, tensor.relative_l2) == (None, None)


# command line


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_command_writes_and_reports(base: Path, router: Path, out: Path) -> None:
    result = invoke(base, router, "-o", out)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert f"Wrote {out}" in result.stderr
    assert "3 router tensors replaced" in result.stderr
    assert out.exists()


def test_command_dry_run_prints_the_plan(base: Path, router: Path, out: Path) -> None:
    result = invoke(base, router, "-o", out, "--dry-run")
    assert result.exit_code == 0
    assert not out.exists()
    size = format_size(plan_conversion(base, router, out).output_bytes)
    for line in (
        "3 router tensors replaced:",
        "  blk.1.ffn_gate_inp.weight F32 [32, 16] -> F32, from model.layers.1.mlp.gate.weight (F32)",
        f"  remoe.tool.version = '{__version__}'",
        f"input, {format_size(base.stat().st_size)} in all; output +288 bytes",
        f"output, {size} in all:",
        f"  {out} ({size})",
    ):
        assert line in result.stdout.splitlines()


def test_command_json(base: Path, router: Path, out: Path) -> None:
    planned = json.loads(invoke(base, router, "-o", out, "--dry-run", "--json").stdout)
    assert not out.exists()
    written = json.loads(invoke(base, router, "-o", out, "--json").stdout)
    assert planned == written
    assert written["output_bytes"] == out.stat().st_size
    assert written["files"] == [{"base": str(base), "output": str(out), "bytes": out.stat().st_size}]
    assert written["replaced"][0] == {
        "name": "blk.0.ffn_gate_inp.weight",
        "shape": [32, 16],
        "old_type": "F32",
        "new_type": "F32",
        "source": str(router),
        "key": "model.layers.0.mlp.gate.weight",
        "source_type": "F32",
    }
    difference = json.loads(invoke("--diff", base, out, "--json").stdout)
    assert [tensor["name"] for tensor in difference["tensors"]] == [tensor["name"] for tensor in written["replaced"]]


def test_command_diff(base: Path, router: Path, out: Path) -> None:
    convert(base, router, out)
    result = invoke("--diff", base, out)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert re.fullmatch(
        r"blk\.0\.ffn_gate_inp\.weight: F32 \[32, 16\], \d+ bytes differ, "
        r"max \|b - a\| [\d.]+, \|b - a\| / \|a\| [\d.]+",
        lines[0],
    )
    assert "general.base_model.0.name: absent -> 'Tiny'" in lines
    assert lines[-1] == "3 tensors differ, 8 are the same; 5 metadata keys differ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "Missing option '-o' / '--output'."),
        (["a", "-o", "o"], "Missing argument 'ROUTER'. To change the layout alone, give --align."),
        (["--diff", "a"], "--diff compares two GGUFs; name another one."),
        (["--diff", "a", "b", "--align", "64"], "--align has no effect with --diff."),
        (["--diff", "a", "b", "-o", "o"], "--output has no effect with --diff."),
        (["--diff", "a", "b", "--force"], "--force has no effect with --diff."),
        (["--diff", "a", "b", "--dry-run"], "--dry-run has no effect with --diff."),
    ],
)
def test_command_refuses_wrong_usage(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
