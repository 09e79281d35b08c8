"""Checkpoints of Hugging Face become GGUFs that llama.cpp routes alike."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file
from tiny_hf import ARCHITECTURES, EXPERTS, LAYERS, TOP_K, byte_level_tokenizer, tiny_model
from tokenizers import Regex, Tokenizer, pre_tokenizers

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.from_hf import QUANTS, from_hf, plan_from_hf, read_checkpoint
from remoe_edge.gguf_io.hf_converter import pre_tokenizer_name
from remoe_edge.gguf_io.router import INDEX_NAME
from remoe_edge.routing.trace import load_trace
from remoe_edge.runtime.llama import load_model, open_model

runtime = pytest.mark.runtime
# Libraries of the router's side, and of their import, warn about what is not ours.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

TOKENS = [int(token) for token in np.random.default_rng(7).integers(1, 320, 96)]
# Probabilities closer than this may change order: both sides compute in float32, in different order.
TIE = 1e-5

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXT = "Don't REPEAT 12345 of them:\n\n  the router's choice,\tnaïve — 3.14!\r\n   End  "


def hf_routing(folder: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """ids [tokens, layers, k], and what the router ranks experts by, [tokens, layers, experts]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, scores = [], []

    def hook(router: torch.nn.Module, _arguments: Any, output: Any) -> None:
        logits, _weights, chosen = output
        ids.append(chosen.reshape(len(TOKENS), -1).numpy())
        ranked = logits.float().reshape(len(TOKENS), -1)
        scores.append((ranked.sigmoid() if sigmoid else ranked.softmax(-1)).numpy())

    sigmoid = model.config.model_type == "deepseek_v3"
    routers = [m for m in model.modules() if type(m).__name__.endswith(("TopKRouter", "TopkRouter"))]
    assert len(routers) == LAYERS
    for router in routers:
        router.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    return np.stack(ids, 1), np.stack(scores, 1)


# Tokenizers trained anew: expression, whether whole words skip the merges, llama.cpp's name.
TOKENIZERS = {
    "olmoe": (None, False, "gpt-2"),
    "qwen2_moe": (QWEN2, False, "qwen2"),
    "deepseek_v2": (LLAMA3, False, "dbrx"),
    "mixtral": (LLAMA3, True, "llama-bpe"),
}


@runtime
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_routes_and_tokenizes_as_the_checkpoint_does(tmp_path: Path, arch: str) -> None:
    folder = tiny_model(arch, tmp_path / "model")
    tokenizer, name = another_tokenizer(*TOKENIZERS.get(arch, (None, False, "gpt-2")))
    tokenizer.save(str(folder / "tokenizer.json"))
    from_hf(folder, tmp_path / "m.gguf", quant="F32")
    wanted, scores = hf_routing(folder)
    with open_model(tmp_path / "m.gguf", n_ctx=128, n_threads=1, repack=False) as session:
        assert session.metadata("tokenizer.ggml.pre") == name
        assert session.tokenize(TEXT) == tokenizer.encode(TEXT).ids
        session.trace_start(tmp_path / "trace.npz")
        session.decode(TOKENS, all_logits=True)
        session.trace_stop()
    got = load_trace(tmp_path / "trace.npz").ids.astype(np.int64)
    assert got.shape == wanted.shape == (len(TOKENS), LAYERS, TOP_K)
    assert len(np.unique(wanted)) == EXPERTS
    equal = (np.sort(got, -1) == np.sort(wanted, -1)).all(-1)
    assert (~equal).sum() <= 2
    for token, layer in np.argwhere(~equal):
        other = set(got[token, layer]) ^ set(wanted[token, layer])
        assert np.ptp(scores[token, layer, sorted(other)]) < TIE


def another_tokenizer(expression: str | None, whole_words: bool, name: str) -> tuple[Tokenizer, str]:
    tokenizer = byte_level_tokenizer()
    if expression:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.model.ignore_merges = whole_words
    return tokenizer, name


@runtime
def test_router_and_quant(tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", tmp_path / "model", max_shard_size="200KB")
    assert (folder / INDEX_NAME).is_file()
    router = {
        f"model.layers.{layer}.mlp.gate.weight": np.random.default_rng(layer).normal(size=(EXPERTS, 64)).astype("f4")
        for layer in range(LAYERS)
    }
    save_file(router, tmp_path / "router.safetensors")
    stages: list[str] = []
    command = ["convert", str(folder), "-o", "m.gguf", "--quant", "q4_k_m", "--router", "router.safetensors", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "remoe_edge", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    stages = ran.stderr.splitlines()
    assert [line for line in stages if line.startswith(("Converting to F32", "Quantizing to Q4_K_M", "Writing"))]
    said = json.loads(ran.stdout)
    assert said["quant"] == "Q4_K_M"
    assert said["output_bytes"] == (tmp_path / "m.gguf").stat().st_size
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in range(LAYERS):
        assert np.array_equal(
            tensors[f"blk.{layer}.ffn_gate_inp.weight"].data, router[f"model.layers.{layer}.mlp.gate.weight"]
        )
    # 64 columns are too few for a K-quant, and llama-quantize takes a legacy type.
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q5_0"
    assert "remoe.router.sha256" in reader.fields
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model", "router.safetensors"]
    with load_model(tmp_path / "m.gguf") as model:
        assert model.n_vocab == 320


@runtime
def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("deepseek_v2", tmp_path / "model")
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("e"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(RemoeError, match=r"model: its tokenizer splits text in a way that llama.cpp has no name for"):
        from_hf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@runtime
def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = tiny_model("deepseek_v2", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RemoeError, match="converter failed with status 1"):
        from_hf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@runtime
def test_unsupported_architecture_says_so(tmp_path: Path) -> None:
    folder = tiny_model("olmoe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(RemoeError, match=r"(?s)last lines:.*NobodysForCausalLM is not supported"):
        from_hf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@runtime
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    folder = tiny_model("olmoe", tmp_path / "model")
    with subprocess.Popen(
        [sys.executable, "-m", "remoe_edge", "convert", folder, "-o", tmp_path / "m.gguf"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Converting"):
                break
        children = _children(process.pid)
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline:
            children = _children(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("olmoe", tmp_path_factory.mktemp("hf") / "model", max_shard_size="200KB")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_checkpoint_is_understood(folder: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.architecture == "OlmoeForCausalLM"
    assert len(checkpoint.files) > 2
    assert checkpoint.moe_layers == LAYERS
    stored = sum(value.size for file in folder.glob("*.safetensors") for value in load_file(file).values())
    assert checkpoint.parameters == stored
    plan = plan_from_hf(folder, tmp_path / "m.gguf", quant="q4_k_m")
    assert (plan.quant, plan.intermediate) == ("Q4_K_M", "F32")
    assert plan_from_hf(folder, tmp_path / "m.gguf").quant == "F16"


def test_missing_shard(folder: Path, tmp_path: Path) -> None:
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    for index in (folder / INDEX_NAME).exists(), False:
        with pytest.raises(RemoeError, match=rf"{gone.name}: is missing \(1 of \d+ files are\)"):
            plan_from_hf(folder, tmp_path / "m.gguf")
        if index:
            (folder / INDEX_NAME).unlink()


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; give a checkpoint's folder"),
    "adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), r"it is an adapter \(PEFT\)"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no architecture": (lambda f: _change(f / "config.json", architectures=None), "has no 'architectures'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("["), "tokenizer.json: not valid JSON"),
    "cut short": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 100), "not a sound safetensors file"),
    "header": (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"\xff" * 100), "not a sound safetensors"),
    "leads outside": (
        lambda f: _change(f / INDEX_NAME, weight_map={"model.norm.weight": "../model.safetensors"}),
        "which is not the name of a file beside it",
    ),
    "other tensor": (
        lambda f: _change(f / INDEX_NAME, weight_map={"model.x": sorted(f.glob("*.safetensors"))[0].name}),
        "has no tensor 'model.x'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    harm, message = BROKEN[case]
    harm(folder)
    with pytest.raises(RemoeError, match=message):
        from_hf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RemoeError, match="pickled checkpoints are not read"):
        from_hf(folder, tmp_path / "m.gguf")


def test_router_is_checked_before_the_work(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    for layers, columns, message in ((1, 64, "has no blk.1"), (3, 64, "has blk.2"), (2, 32, r"expected \[8, 64\]")):
        weights = {
            f"model.layers.{layer}.mlp.gate.weight": np.ones((EXPERTS, columns), "f4") for layer in range(layers)
        }
        save_file(weights, path)
        with pytest.raises(RemoeError, match=message):
            plan_from_hf(folder, tmp_path / "m.gguf", router=path)


def test_dense_model_takes_no_router(tmp_path: Path, folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({"model.embed_tokens.weight": np.ones((4, 4), "f4")}, folder / "model.safetensors")
    assert plan_from_hf(folder, tmp_path / "m.gguf").checkpoint.moe_layers == 0
    with pytest.raises(RemoeError, match="not a Mixture-of-Experts model"):
        plan_from_hf(folder, tmp_path / "m.gguf", router=tmp_path / "router.safetensors")


def test_mxfp4_is_left_alone(tmp_path: Path, folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    experts = {"model.layers.0.mlp.experts.down_proj_blocks": np.ones((2, 4, 1, 16), "u1")}
    save_file(experts, folder / "model.safetensors")
    with pytest.raises(RemoeError, match="MXFP4 already"):
        plan_from_hf(folder, tmp_path / "m.gguf", quant="Q4_K_M")
    assert plan_from_hf(folder, tmp_path / "m.gguf", quant="F16").checkpoint.parameters == 256


def test_unknown_type_and_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoeError, match=f"'Q4' is no type to write; choose one of {', '.join(QUANTS)}"):
        plan_from_hf(folder, tmp_path / "m.gguf", quant="Q4")
    full = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(RemoeError, match="free, but the conversion needs about"):
        plan_from_hf(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "ignore_merges": True}},
    ],
)
def test_structures_without_a_name(change: dict[str, Any]) -> None:
    known = json.loads(byte_level_tokenizer().to_str())
    assert pre_tokenizer_name(known) == "gpt-2"
    assert pre_tokenizer_name({**known, **change}) is None
