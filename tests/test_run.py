import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_twin import EXPERTS, LAYERS, TOP_K, small_trace, write_small_twin

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.routing.trace import load_trace
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig, default_threads, load_model, open_model


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("run") / "twin.gguf")


@pytest.fixture(scope="session")
def runtime() -> None:
    ensure_runtime()


needs_runtime = [pytest.mark.runtime, pytest.mark.usefixtures("runtime")]


def run(model: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "remoe_edge", "run", str(model), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-cache", "off", "--io", "direct"], "--io has no effect with --expert-cache off"),
        (["--top-p", "0.5"], "--top-p has no effect with --temp 0"),
        (["--seed", "1"], "--seed has no effect with --temp 0"),
        (["--force"], "--force has no effect without --trace"),
        ([], "--prompt"),
    ],
)
def test_wrong_usage(twin: Path, arguments: list[str], message: str) -> None:
    prompt = ["-p", "w00000"] if arguments else []
    result = CliRunner().invoke(cli, ["run", str(twin), *prompt, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_existing_trace_is_refused(twin: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    trace.write_text("mine")
    result = run(twin, "-p", "w00000", "--trace", str(trace))
    assert result.returncode == 1
    assert "pass --force" in result.stderr


def test_default_threads_are_cores() -> None:
    assert default_threads() >= 1


class TestWithRuntime:
    pytestmark = needs_runtime

    def test_text_to_stdout_and_the_cache_to_stderr(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000", "-n", "6", "--expert-cache", "4s", "--policy", "lru", "--io", "mmap")
        assert result.returncode == 0, result.stderr
        assert result.stdout == "w00001w00002w00003w00004w00005w00006\n"
        for part in "4 slots in each of 3 layers", "policy lru", "mmap reads", "plain expert kernels", "hits", "TPOT":
            assert part in result.stderr
        assert len(result.stderr.splitlines()) == 3

    def test_json_has_text_and_counters(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000", "-n", "6", "--expert-cache", f"{EXPERTS}s", "--json")
        content = json.loads(result.stdout)
        assert content["text"] == "w00001w00002w00003w00004w00005w00006"
        assert (content["n_prompt"], content["n_gen"], content["cache"]["n_slots"]) == (1, 6, EXPERTS)
        assert content["hit_rate"] == 1

    def test_off_is_stock_and_gives_the_same_text(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000", "-n", "3", "--expert-cache", "off")
        assert result.stdout == "w00001w00002w00003\n"
        assert "no expert cache" in result.stderr

    def test_a_trace_is_recorded(self, twin: Path, tmp_path: Path) -> None:
        path = tmp_path / "trace.npz"
        assert run(twin, "-p", "w00000", "-n", "6", "--trace", str(path)).returncode == 0
        trace = load_trace(path)
        assert trace.ids.shape == (6, LAYERS, TOP_K)
        assert np.array_equal(np.sort(trace.ids, axis=2), np.sort(small_trace().ids[:6], axis=2))

    def test_a_budget_below_the_floor_is_refused_with_the_floor(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000", "--expert-cache", "1s")
        assert (result.returncode, result.stdout) == (1, "")
        assert "below the floor" in result.stderr
        assert f"{TOP_K}s" in result.stderr

    def test_a_prompt_longer_than_the_context_is_refused(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000w00001w00002", "-c", "2")
        assert result.returncode == 1
        assert "3 tokens, but the context only 2; raise --ctx" in result.stderr

    def test_a_missing_chat_template_is_refused(self, twin: Path) -> None:
        result = run(twin, "-p", "w00000", "--chat")
        assert result.returncode == 1
        assert "has no chat template" in result.stderr

    def test_interrupt_ends_the_generation_and_prints_the_summary(self, twin: Path) -> None:
        command = [sys.executable, "-m", "remoe_edge", "run", str(twin), "-p", "w00000", "-n", "20000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.read(12) == "w00001w00002"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "TPOT" in errors
        assert "Traceback" not in errors

    def test_draws_depend_on_the_seed_alone(self, twin: Path) -> None:
        with open_model(twin, CacheConfig("4s")) as session:

            def draw(seed: int) -> list[int]:
                session.clear()
                session.decode(session.tokenize("w00000"))
                return list(session.generate(8, temp=50.0, seed=seed))

            assert draw(1) == draw(1)
            assert draw(1) != draw(2)

    def test_logits_of_every_token_or_of_the_last(self, twin: Path) -> None:
        with load_model(twin) as model:
            tokens = model.tokenize("w00000w00001w00002")
            assert model.detokenize(tokens) == "w00000w00001w00002"
            with model.session(n_batch=4, n_ubatch=4) as all_of_them, model.session() as last:
                all_of_them.decode(tokens, all_logits=True)
                last.decode(tokens)
                assert all_of_them.all_logits().shape == (3, model.n_vocab)
                assert np.array_equal(all_of_them.logits(), last.logits())
                with pytest.raises(ValueError, match="do not fit"):
                    all_of_them.decode(tokens * 2, all_logits=True)

    def test_a_full_context_is_an_error(self, twin: Path) -> None:
        with (
            open_model(twin, CacheConfig("4s"), n_ctx=256) as session,
            pytest.raises(RemoeError, match="context of 256 tokens is full"),
        ):
            session.decode([300] * 257)

    def test_what_is_no_model_is_refused_with_llama_cpps_reason(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(RemoeError, match=r"bad\.gguf: .+"), load_model(path):
            pass
