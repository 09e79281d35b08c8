"""Schedules, what is held out, how text becomes tokens, quantised checkpoints, cards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_hf import LAYERS, tiny_model  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from remoe_edge.cli import cli  # noqa: E402
from remoe_edge.errors import RemoeError  # noqa: E402
from remoe_edge.tuning.data import Sequences, load_sequences  # noqa: E402
from remoe_edge.tuning.export import export_checkpoint  # noqa: E402
from remoe_edge.tuning.load import load_model, load_tokenizer  # noqa: E402
from remoe_edge.tuning.train import CHECKPOINT, TuneConfig, rate_at, tune  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("olmoe", tmp_path_factory.mktemp("olmoe"))


def test_rates() -> None:
    config = TuneConfig(steps=10, warm_up=4)
    assert [rate_at(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = replace(config, schedule="linear")
    assert [rate_at(step, linear) for step in (3, 4, 7, 9)] == pytest.approx([1, 1, 0.5, 1 / 6])
    cosine = replace(config, schedule="cosine")
    assert [rate_at(step, cosine) for step in (3, 4, 7)] == pytest.approx([1, 1, 0.5])
    assert 0 < rate_at(9, cosine) < 0.1
    assert rate_at(0, replace(config, warm_up=0)) == 1


def test_held_out_rows_come_from_everywhere_and_are_not_trained_on() -> None:
    ids = np.repeat(np.arange(200)[:, None], 9, axis=1)
    train, held_out = Sequences(ids, np.ones((200, 8), np.bool_), {"a": "b"}).split(20)
    rows = held_out.ids[:, 0]
    assert len(rows) == 20
    assert sorted({*train.ids[:, 0], *rows}) == list(range(200))
    assert len(train) == 180
    # In the first, the second, the third and the last quarter.
    assert set(rows // 50) == {0, 1, 2, 3}
    assert train.files == {"a": "b"}
    with pytest.raises(RemoeError, match="200 sequences of 8 tokens leave nothing"):
        Sequences(ids, np.ones((200, 8), np.bool_), {}).split(200)


def test_long_text_is_cut_between_words(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(folder))
    text = "experts router neighbouring tokens\n" * 40 + "x" * 300
    (tmp_path / "t.txt").write_text(text)
    whole = load_sequences([tmp_path / "t.txt"], tokenizer, 16)
    monkeypatch.setattr("remoe_edge.tuning.data._PIECE", 50)
    pieces = load_sequences([tmp_path / "t.txt"], tokenizer, 16)
    # The same tokens but near the run of letters, which has no place to cut.
    words = len(tokenizer(text[:-300])["input_ids"]) // 16 - 1
    assert np.array_equal(pieces.ids[:words], whole.ids[:words])
    assert tokenizer.decode(pieces.ids[:, :-1].flatten()) in text


def test_texts_begin_as_the_tokenizer_begins_them(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    (tmp_path / "t.jsonl").write_text((json.dumps({"text": "one two three"}) + "\n") * 4)
    found = load_sequences([tmp_path / "t.jsonl"], tokenizer, 8).ids
    assert found[0, 0] == 0
    assert tokenizer.decode(found[:, :-1].flatten()).count("<|endoftext|><|endoftext|>one") >= 1


def write_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Store the experts of a tiny gpt-oss as OpenAI does; what their values are then."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        # Stored [experts, out, in / 32, 16 bytes]; in the model [experts, in, out].
        experts, inner, outer = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, outer, inner // 32, 16, 2), generator=generator)
        scales = torch.randint(121, 125, (experts, outer, inner // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        rows = table[codes].flatten(-2) * 2.0 ** (scales - 127)[..., None]
        values[name] = rows.flatten(-2).transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return values


def test_mxfp4_becomes_weights_with_a_backward_pass(tmp_path: Path) -> None:
    folder = tiny_model("gpt_oss", tmp_path / "model")
    values = write_mxfp4(folder)
    model = load_model(str(folder), dtype="bfloat16")
    loaded = dict(model.named_parameters())
    assert len(values) == 2 * LAYERS
    for name, expected in values.items():
        assert torch.equal(loaded[name].float(), expected)


def test_other_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_model("olmoe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(RemoeError, match=r"is quantised \(gptq\)"):
        load_model(str(folder))


def test_a_run_that_cannot_be_believed_is_named(folder: Path, tmp_path: Path) -> None:
    from remoe_edge.tuning.adapters import adapt

    rows = Sequences(np.random.default_rng(0).integers(3, 60, (8, 9)), np.ones((8, 8), np.bool_), {})
    (tmp_path / CHECKPOINT).write_bytes(b"\xff" * 64)
    with pytest.raises(RemoeError, match="is damaged"):
        tune(adapt(load_model(str(folder))), rows, rows, TuneConfig(steps=1), folder=tmp_path)


def test_exported_router_in_the_type_asked_for(tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    router = {n: torch.randn(t.shape) for n, t in tensors.items() if n.endswith("mlp.gate.weight")}
    assert len(router) == LAYERS
    for dtype in (None, torch.float32):
        output = tmp_path / f"out-{dtype}"
        export_checkpoint(folder, router, output, dtype=dtype)
        found = load_file(output / "model.safetensors")
        for name, tensor in found.items():
            expected = router[name].to(dtype or torch.bfloat16) if name in router else tensors[name]
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def test_card_for_people(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The router chooses experts for each token. " * 40)
    arguments: list[Any] = ["tune", folder, "--data", text, "-o", tmp_path / "r.safetensors", "--json"]
    arguments += ["--length", "16", "--steps", "2", "--held-out", "2", "--check-every", "1", "--lr", "0.01"]
    arguments += ["--export-hf", tmp_path / "tuned", "--schedule", "cosine", "--warm-up", "1"]
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    card = (tmp_path / "r.md").read_text()
    assert card == (tmp_path / "tuned" / "remoe-edge.md").read_text()
    assert said["frozen_sha256"] in card
    assert f"| {text} | {said['data_sha256'][str(text)]} |" in card
    assert "| schedule | cosine |" in card
    assert f"{said['ppl']['base']:.4f}" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export-router-dtype", "float32"], "no effect without --export-hf"),
        (["-o", "/nowhere/r.safetensors"], "/nowhere is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text")
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "r.safetensors")]
    runner = CliRunner()
    done = runner.invoke(cli, ["tune", str(folder), "--data", str(text), *output, *arguments])
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)


def test_a_model_of_the_hub_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    arguments = ["tune", "someone/model", "--data", str(tmp_path / "text.txt"), "-o", str(tmp_path / "r.safetensors")]
    with pytest.raises(RemoeError, match="needs MODEL to be a folder"):
        CliRunner().invoke(cli, [*arguments, "--export-hf", str(tmp_path / "out")], catch_exceptions=False)


def test_a_run_goes_on_with_its_own_model_only(folder: Path, tmp_path: Path) -> None:
    from remoe_edge.tuning.adapters import adapt

    rows = Sequences(np.random.default_rng(0).integers(3, 60, (8, 9)), np.ones((8, 8), np.bool_), {})
    config = TuneConfig(steps=1, accumulation=1)
    tune(adapt(load_model(str(folder))), rows, rows, config, folder=tmp_path)
    other = adapt(load_model(str(folder)))
    with torch.no_grad():
        # The same routers; one number of one expert is another.
        next(p for n, p in other.model.named_parameters() if ".experts." in n)[0, 0, 0] += 1
    with pytest.raises(RemoeError, match="other settings, data or model"):
        tune(other, rows, rows, config, folder=tmp_path)
    assert tune(adapt(load_model(str(folder))), rows, rows, config, folder=tmp_path).checks[-1].step == 1
