"""`remoe-edge trace`: what is recorded of a GGUF, and what the self-test says of it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from observe import observe_routing
from small_twin import EXPERTS, STEPS, TOP_K, small_trace, write_small_twin
from tiny_models import write_tiny_model

from remoe_edge.cli import cli
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.bench import fingerprint
from remoe_edge.measure.workloads import Prompt
from remoe_edge.routing.record import join, record_decode, record_forced
from remoe_edge.routing.selftest import self_test
from remoe_edge.routing.trace import Trace, load_trace, packaged_trace
from remoe_edge.runtime.llama import CacheConfig, load_model

PROMPTS = [Prompt("first", "the cat sat on"), Prompt("second", "a mat")]
TEXT = "A bridge over the river. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "tiny.gguf"
    return write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=16, k=3, n_layer=2, hidden=256, ff=256, seed=2)


def tokenize(model: Path, text: str) -> list[int]:
    with load_model(model) as loaded:
        return loaded.tokenize(text)


def remoe(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "remoe_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class TestSelfTest:
    def test_a_real_trace_is_fine(self) -> None:
        test = self_test(packaged_trace())
        assert test.verdict == "ok"
        assert test.chance == 8 / 64
        assert test.reuse_rate == pytest.approx(0.435, abs=0.001)
        assert len(test.reuse_rate_per_layer) == 16

    def test_experts_without_order_in_time_are_suspect(self) -> None:
        trace = packaged_trace()
        labels = np.random.default_rng(1).permuted(
            np.tile(np.arange(64, dtype=np.uint16), (trace.tokens * 16, 1)), axis=1
        )
        drawn = labels[:, :8].reshape(trace.ids.shape)
        test = self_test(replace(trace, ids=drawn))
        assert test.verdict == "suspect"
        assert "drawn at random would share 12.5%" in test.reason

    def test_a_trace_that_stands_still_is_suspect(self) -> None:
        trace = packaged_trace()
        assert self_test(replace(trace, ids=np.repeat(trace.ids[:1], trace.tokens, axis=0))).verdict == "suspect"

    def test_few_steps_say_nothing(self) -> None:
        ids = packaged_trace().ids[:20]
        alone = Trace(ids=ids, offs=np.arange(0, 21, 2), meta={"experts": 64})
        assert self_test(alone).verdict == "too short"

    def test_all_experts(self) -> None:
        ids = np.tile(np.arange(4, dtype=np.uint16), (30, 2, 1))
        assert self_test(Trace(ids=ids, offs=np.array([0, 30]), meta={"experts": 4})).verdict == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher-forced", __file__, "-n", "4"], "-n has no effect with --teacher-forced"),
        (["--teacher-forced", __file__, "-p", "x"], "-p has no effect with --teacher-forced"),
        (["--length", "64"], "--length has no effect without --teacher-forced"),
        (["-p", "x", "--workload", "text"], "-p and --workload exclude each other"),
        (["-p", "x", "--prompts", "2"], "--prompts has no effect with -p"),
    ],
)
def test_wrong_usage(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["trace", str(model), "-o", str(tmp_path / "t.npz"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_joined_traces_are_sequences() -> None:
    trace = small_trace()
    both = join([trace, trace])
    assert both.offs.tolist() == [0, STEPS, 2 * STEPS]
    assert (both.ids[STEPS:] == trace.ids).all()


@pytest.mark.runtime
class TestOwnOutput:
    def test_is_what_another_observer_sees(self, model: Path) -> None:
        recording = record_decode(model, PROMPTS, 12, CacheConfig("4s"), probs=True, n_threads=1)
        trace = recording.trace
        prompts = [tokenize(model, prompt.text) for prompt in PROMPTS]
        assert recording.n_prompt == sum(map(len, prompts))
        assert trace.offs.tolist() == [0, 12, 24]
        for sequence, prompt in enumerate(prompts):
            seen = observe_routing(model, prompt, 13)
            own = slice(sequence * 12, sequence * 12 + 12)
            assert (trace.ids[own] == seen.ids[len(prompt) :]).all()
            scores = seen.router[len(prompt) :].astype(np.float64)
            probs = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
            assert trace.probs is not None
            chosen = np.take_along_axis(probs, trace.ids[own].astype(int), axis=2)
            np.testing.assert_allclose(trace.probs[own], chosen, rtol=1e-4)

    def test_the_cache_changes_nothing(self, model: Path) -> None:
        off, on = (
            record_decode(model, PROMPTS, 10, CacheConfig(budget), n_threads=1).trace for budget in ("off", "4s")
        )
        assert off.digest() == on.digest()
        assert off.probs is None

    def test_meta(self, model: Path) -> None:
        meta = record_decode(model, PROMPTS, 2, CacheConfig("4s"), n_threads=1).trace.meta
        assert (meta["layers"], meta["experts"], meta["top_k"], meta["phase"]) == (2, 16, 3, "decode")
        assert meta["prompts"] == ["first", "second"]
        assert meta["model"].startswith("tiny qwen3moe")
        assert meta["model_bytes"] == model.stat().st_size
        assert meta["model_fingerprint"] == fingerprint(read_model(model))
        assert meta["source"].startswith("remoe-edge ")
        assert meta["licence"] == ""

    @pytest.mark.parametrize("arch", ["gpt-oss", "deepseek2"])
    def test_probabilities_of_other_routers(self, tmp_path: Path, arch: str) -> None:
        path = write_tiny_model(tmp_path / "m.gguf", arch, n_expert=8, k=3, n_layer=2, hidden=256, ff=256)
        trace = record_decode(path, PROMPTS, 10, CacheConfig("4s"), probs=True, n_threads=1).trace
        assert trace.probs is not None
        sums = trace.probs.sum(axis=2)
        assert (np.diff(trace.probs, axis=2) <= 1e-6).all(), "the router's ranking"
        if arch == "gpt-oss":
            np.testing.assert_allclose(sums, 1, rtol=1e-5)
        else:
            assert ((sums > 0) & (sums < 3) & (np.abs(sums - 1) > 1e-3)).all()


@pytest.mark.runtime
class TestGivenText:
    def test_every_layer_of_every_token(self, model: Path) -> None:
        tokens = tokenize(model, TEXT)
        recording = record_forced(
            model, TEXT, CacheConfig("4s"), length=200, probs=True, name="bridge.txt", n_threads=1
        )
        trace = recording.trace
        begin = len(tokenize(model, ""))
        assert recording.n_prompt == 0
        assert trace.computed.all()
        lengths = np.diff(trace.offs)
        assert (lengths[:-1] == 200).all()
        assert lengths.sum() == len(tokens) - begin + begin * len(lengths)
        assert trace.probs is not None
        assert (trace.probs > 0).all()
        assert trace.meta["phase"] == "teacher-forced"
        assert trace.meta["text"] == "bridge.txt"
        # The last layer is computed for the tokens whose logits are wanted: here too, so the first one will do.
        seen = observe_routing(model, tokens[:200], 1, ubatch=128)
        assert (trace.ids[:200, 0] == seen.ids[:200, 0]).all()

    def test_the_first_sequences_only(self, model: Path) -> None:
        assert record_forced(model, TEXT, CacheConfig("off"), length=64, limit=3, n_threads=1).trace.offs.tolist() == [
            0,
            64,
            128,
            192,
        ]


@pytest.mark.runtime
class TestCommand:
    def test_a_twin_gives_its_trace_back(self, tmp_path: Path) -> None:
        """And what is recorded can be simulated and made a twin of again."""
        twin, output = write_small_twin(tmp_path / "twin.gguf"), tmp_path / "trace.npz"
        result = remoe("trace", twin, "-p", "w00000", "-n", 40, "-t", 1, "-o", output, "--json")
        assert result.returncode == 0, result.stderr
        trace = load_trace(output)
        assert (trace.ids == small_trace().ids[1:41]).all()
        summary = json.loads(result.stdout)
        assert (summary["tokens"], summary["sequences"], summary["experts"]) == (40, 1, EXPERTS)
        assert summary["chance"] == TOP_K / EXPERTS
        assert summary["verdict"] == "suspect", "the small twin's trace is drawn at random"
        assert "SUSPECT capture" in result.stderr
        rows = json.loads(remoe("simulate", output, "--slots", "4", "--policy", "lru", "--json").stdout)
        assert rows[0]["reuse_rate"] == summary["reuse_rate"]
        again = remoe("twin", output, "--hidden", 256, "--ff", 256, "-o", tmp_path / "again.gguf")
        assert again.returncode == 0, again.stderr
        third = record_decode(
            tmp_path / "again.gguf", [Prompt("w", "w00000")], 30, CacheConfig("2s"), n_threads=1
        ).trace
        assert (third.ids == trace.ids[1:31]).all()

    def test_files(self, model: Path, tmp_path: Path) -> None:
        text, output = tmp_path / "text.txt", tmp_path / "trace.npz"
        text.write_text(TEXT)
        result = remoe(
            "trace", model, "--teacher-forced", text, "--length", 64, "--prompts", 2, "--probs", "-o", output
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
        assert "128 read tokens in 2 sequences, 2 MoE layers, top 3 of 16 experts" in result.stderr
        assert load_trace(output).probs is not None
        refused = remoe("trace", model, "-p", "x", "-o", output)
        assert refused.returncode == 1
        assert "pass --force" in refused.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "trace.npz"}

    def test_a_model_without_experts(self, tmp_path: Path) -> None:
        dense = write_tiny_model(tmp_path / "dense.gguf", "llama")
        result = remoe("trace", dense, "-p", "x", "-o", tmp_path / "trace.npz")
        assert result.returncode == 1
        assert "has no experts, so there is no routing to record" in result.stderr

    def test_ctrl_c_keeps_what_was_evaluated(self, model: Path, tmp_path: Path) -> None:
        output = tmp_path / "trace.npz"
        arguments = ["trace", model, "-p", "the cat", "-p", "sat", "-n", "3900", "-t", "1", "-o", output, "--json"]
        command = [sys.executable, "-m", "remoe_edge", *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "own output 10 %" in line:
                    break
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        summary = json.loads(out)
        trace = load_trace(output)
        assert summary["interrupted"]
        assert 0 < trace.tokens == summary["tokens"] < 7800
        assert "Interrupted; wrote" in errors
        assert list(tmp_path.iterdir()) == [output]
