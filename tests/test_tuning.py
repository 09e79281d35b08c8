"""`tune` on random models of every architecture, its guards, its resumption, what it exports, and bad input."""

import gzip
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
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from tiny_hf import ARCHITECTURES, EXPERTS, LAYERS, TOP_K, tiny_model  # noqa: E402

from remoe_edge.cli import cli  # noqa: E402
from remoe_edge.errors import RemoeError  # noqa: E402
from remoe_edge.tuning import train  # noqa: E402
from remoe_edge.tuning.adapters import adapt, record  # noqa: E402
from remoe_edge.tuning.data import Sequences, load_sequences  # noqa: E402
from remoe_edge.tuning.export import apply_router  # noqa: E402
from remoe_edge.tuning.load import load_model, load_tokenizer  # noqa: E402
from remoe_edge.tuning.train import TuneConfig, TuneResult, tune  # noqa: E402
from remoe_edge.tuning.weights import Weights  # noqa: E402

SENTENCES = [
    "The router of a model chooses a few experts for each token. ",
    "Neighbouring tokens that reuse the same experts are cheap. ",
    "Every layer has a router of its own, with 8 experts. ",
]
SHORT = ["--length", "24", "--steps", "4", "--micro-batch", "2", "--accumulation", "2", "--held-out", "4"]
SHORT += ["--lr", "0.01", "--warm-up", "1", "--local-warm-up", "1", "--check-every", "2", "--max-ppl-increase", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(SENTENCES[i] for i in rng.integers(0, 3, 120)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("olmoe", tmp_path_factory.mktemp("olmoe"))


def invoke(*arguments: object) -> str:
    """Run the command; its output. Raises what it raised."""
    done = CliRunner().invoke(cli, ["tune", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_command_tunes_every_architecture(arch: str, text: Path, tmp_path: Path) -> None:
    model = tiny_model(arch, tmp_path / "model")
    output = tmp_path / "router.safetensors"
    invoke(model, "--data", text, "-o", output, *SHORT, "--export-hf", tmp_path / "tuned")
    router = load_file(output)
    before = {n: t for f in sorted(model.glob("*.safetensors")) for n, t in load_file(f).items()}
    after = {n: t for f in sorted((tmp_path / "tuned").glob("*.safetensors")) for n, t in load_file(f).items()}
    assert len([name for name in router if name.endswith(".weight")]) == LAYERS
    assert all(t.shape[0] == EXPERTS and t.dtype == torch.float32 for t in router.values())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(router)
    # transformers loads the exported folder, and it routes as the router file does.
    tuned, base = (adapt(load_model(str(path))) for path in (tmp_path / "tuned", model))
    apply_router(base, output)
    ids = torch.arange(40)[None] + 3
    with torch.no_grad(), record(tuned) as one, record(base) as two:
        tuned.model(input_ids=ids)
        base.model(input_ids=ids)
    assert len(one) == len(two) == LAYERS
    for a, b in zip(one, two, strict=True):
        assert a.ids.shape == (40, TOP_K)
        assert torch.equal(a.ids, b.ids)
        assert torch.allclose(a.probs.sum(-1), torch.ones(40))


def test_tuning_raises_reuse_and_says_what_it_cost(folder: Path, text: Path, tmp_path: Path) -> None:
    settings = [*SHORT, "--steps", "30", "--reuse", "3", "--kl", "0", "--max-ppl-increase", "-1"]
    card = json.loads(
        invoke(folder, "--data", text, "-o", tmp_path / "r.safetensors", *settings, "--json").splitlines()[-1]
    )
    assert card["reuse_rate"]["tuned"] > card["reuse_rate"]["base"] * 1.1
    assert card["settings"]["weights"]["reuse"] == 3
    assert card["data_sha256"].keys() == {str(text)}
    log = [json.loads(line) for line in (tmp_path / "r.safetensors.work" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 31))
    assert log[-1]["reuse"] < log[0]["reuse"]


def test_a_killed_run_ends_with_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    def command(output: Path) -> list[str]:
        arguments = [folder, "--data", text, "-o", output, *SHORT, "--steps", "12"]
        return [sys.executable, "-W", "ignore", "-m", "remoe_edge", "tune", *map(str, arguments)]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    subprocess.run(command(whole), check=True, capture_output=True, env=environment)
    log = tmp_path / "killed.safetensors.work" / "log.jsonl"
    with subprocess.Popen(
        command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as run:
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    assert not killed.exists()
    subprocess.run(command(killed), check=True, capture_output=True, env=environment)
    one, two = load_file(whole), load_file(killed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_the_control_has_cross_entropy_only(folder: Path, text: Path, tmp_path: Path) -> None:
    invoke(folder, "--data", text, "-o", tmp_path / "r.safetensors", *SHORT, "--control", "ce-only")
    log = [json.loads(line) for line in (tmp_path / "r.safetensors.work" / "log.jsonl").read_text().splitlines()]
    assert all(row["loss"] == pytest.approx(row["ce"]) for row in log)
    done = CliRunner().invoke(
        cli, ["tune", str(folder), "--data", str(text), "-o", "x", "--control", "ce-only", "--kl", "1"]
    )
    assert done.exit_code == 2
    assert "--kl has no effect" in done.output


def sequences(rows: int, length: int = 16, seed: int = 0) -> Sequences:
    ids = np.random.default_rng(seed).integers(3, 60, (rows, length + 1))
    return Sequences(ids, np.ones((rows, length), np.bool_), {})


SMALL = TuneConfig(steps=6, learning_rate=0.02, warm_up=1, local_warm_up=1, accumulation=2, check_every=1)


def test_guard_keeps_the_last_state_that_obeys(folder: Path) -> None:
    moe = adapt(load_model(str(folder)))
    result = tune(moe, sequences(40), sequences(4, seed=1), TuneConfig(**{**vars(SMALL), "max_kl": 0.0}))
    # Nothing but the base has a KL of 0: it is what is kept, and the run ends early.
    assert result.after.step == 0
    assert result.stopped is not None
    assert "broke a guard" in result.stopped
    base = adapt(load_model(str(folder))).router_parameters()
    assert all(torch.equal(tensor, base[name]) for name, tensor in result.router.items())


def test_loss_that_is_not_finite_stops_with_the_last_good_state(folder: Path) -> None:
    moe = adapt(load_model(str(folder)))
    config = TuneConfig(
        **{**vars(SMALL), "steps": 50, "learning_rate": 1e37, "warm_up": 0, "max_ppl_increase": None, "patience": 99}
    )
    result = tune(moe, sequences(40), sequences(4, seed=1), config)
    assert result.stopped is not None
    assert "loss of step" in result.stopped
    assert all(torch.isfinite(tensor).all() for tensor in result.router.values())


def test_little_is_lost_between_looks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TuneConfig(**{**vars(SMALL), "check_every": 6})

    def run(place: Path, *, stop: int = 0, fresh: bool = True) -> TuneResult:
        steps: list[int] = []

        def on_step(row: dict[str, Any]) -> None:
            steps.append(row["step"])
            if row["step"] == stop:
                raise KeyboardInterrupt

        moe = adapt(load_model(str(folder)))
        try:
            return tune(moe, sequences(40), sequences(4, seed=1), config, folder=place, on_step=on_step)
        finally:
            assert steps[0] == (1 if fresh else 4)

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(train, "SECONDS_AT_RISK", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=4)
    found = run(tmp_path / "cut", fresh=False)
    assert found.checks == whole.checks
    assert all(torch.equal(tensor, whole.router[name]) for name, tensor in found.router.items())


def test_another_run_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        moe = adapt(load_model(str(folder)))
        config = TuneConfig(**{**vars(SMALL), "steps": 1, "seed": seed})
        if seed == 0:
            tune(moe, sequences(40), sequences(4, seed=1), config, folder=tmp_path)
            continue
        with pytest.raises(RemoeError, match="other settings"):
            tune(moe, sequences(40), sequences(4, seed=1), config, folder=tmp_path)


def test_router_of_a_bfloat16_model_computes_in_float32(folder: Path) -> None:
    moe = adapt(load_model(str(folder), dtype="bfloat16"))
    assert {p.dtype for p in moe.router_parameters().values()} == {torch.float32}
    with torch.no_grad(), record(moe) as routings:
        moe.model(input_ids=torch.arange(10)[None] + 3)
    assert {routing.logits.dtype for routing in routings} == {torch.float32}
    # Products of bfloat16 hidden states with float32 weights: more digits than bfloat16 has.
    assert any((r.logits.bfloat16().float() != r.logits).any() for r in routings)


def test_ids_are_ranked_and_agree_with_the_probabilities(folder: Path) -> None:
    moe = adapt(load_model(str(folder)))
    with torch.no_grad(), record(moe) as routings:
        moe.model(input_ids=torch.arange(30)[None] + 3)
    for routing in routings:
        assert torch.equal(routing.ids, routing.probs.topk(TOP_K).indices)


# Data


def test_formats_give_the_same_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    long = "one two three four five " * 20
    answer = {"role": "assistant", "content": "yes"}
    files = {
        "a.jsonl": json.dumps({"text": long}) + "\n",
        "b.json": json.dumps([{"text": long}]),
        "c.txt": long,
        "d.jsonl": json.dumps({"question": long, "answer": "yes"}) + "\n",
        "e.json": json.dumps([{"instruction": long, "input": "", "response": "yes"}]),
        "f.jsonl": json.dumps({"messages": [{"role": "user", "content": long}, answer]}),
        "g.jsonl": json.dumps({"conversations": [{"from": "human", "value": long}, {"from": "gpt", "value": "yes"}]}),
    }
    found = []
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        found.append(load_sequences([tmp_path / name], tokenizer, 20).ids)
    (tmp_path / "h.txt.gz").write_bytes(gzip.compress(long.encode()))
    found.append(load_sequences([tmp_path / "h.txt.gz"], tokenizer, 20).ids)
    assert all((ids[:5] == found[0][:5]).all() for ids in found)
    # Rows overlap by one: every token but the first is predicted once.
    assert (found[0][1:, 0] == found[0][:-1, -1]).all()


def test_only_answers_count_when_asked(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abc def", "response": "xyz"}) + "\n" for _ in range(20)))
    rows = load_sequences([path], tokenizer, 10, responses_only=True)
    learned = tokenizer.decode(rows.ids[:, 1:][rows.learn]).replace("<|endoftext|>", "")
    assert set(learned) <= set("xyz\n")
    assert load_sequences([path], tokenizer, 10).learn.all()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = load_sequences([path], tokenizer, 10, responses_only=True)
    assert "<user>abc def<assistant>xyz<|endoftext|>" in tokenizer.decode(np.append(chat.ids[0, 0], chat.ids[:, 1:]))
    assert set(tokenizer.decode(chat.ids[:, 1:][chat.learn]).replace("<|endoftext|>", "")) == set("xyz")
    text = tmp_path / "plain.txt"
    text.write_text("plain text " * 50)
    with pytest.raises(RemoeError, match="answers cannot be told apart"):
        load_sequences([text], tokenizer, 10, responses_only=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"caf\xe9 " * 100, r"not UTF-8 text \(byte 3\)"),
        ("a.txt", b"short", "too few for two sequences"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2: is not JSON"),
        ("a.jsonl", b'{"other": 1}', "line 1: has no text"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "no role or no content"),
        ("a.json", b'"text"', "neither JSON Lines nor a JSON array"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
    ],
)
def test_bad_data_is_named(folder: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RemoeError, match=message):
        load_sequences([path], load_tokenizer(str(folder)), 24)


def test_a_line_of_ten_megabytes_is_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 2_000_000)
    rows = load_sequences([path], load_tokenizer(str(folder)), 512)
    assert rows.ids.size > 2_000_000


def test_bad_models_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match=r"no config\.json"):
        load_model(str(tmp_path))
    many = tiny_model("olmoe", tmp_path / "many", max_shard_size="100KB")
    shard = sorted(many.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RemoeError, match=f"{shard.name} is missing"):
        load_model(str(many))
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RemoeError, match="cannot be loaded"):
        load_model(str(broken))
    import transformers

    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(RemoeError, match="type 'llama' cannot be tuned; supported are olmoe"):
        adapt(dense)


def test_a_full_disk_leaves_no_router_and_the_next_run_writes_it(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remoe_edge.tuning import export

    def full(_tensors: object, _metadata: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save", full)
    output = tmp_path / "r.safetensors"
    with pytest.raises(RemoeError, match="No space left"):
        invoke(folder, "--data", text, "-o", output, *SHORT)
    # The router comes last, so that what is there is whole; the next run writes its card again.
    assert {path.name for path in tmp_path.iterdir()} == {"r.md", "r.safetensors.work"}
    monkeypatch.undo()
    invoke(folder, "--data", text, "-o", output, *SHORT)
    assert output.exists()


def test_memory_of_the_accelerator_runs_out_with_advice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = adapt(load_model(str(folder)))

    def fail(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(moe.model, "forward", fail)
    with pytest.raises(RemoeError, match="smaller --micro-batch"):
        tune(moe, sequences(40), sequences(4, seed=1), SMALL)


def test_weights_without_a_term() -> None:
    assert Weights().without("kl") == Weights(kl=0.0)
