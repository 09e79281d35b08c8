"""`remoe-edge trace` of a Hugging Face folder."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tiny_hf = pytest.importorskip("tiny_hf")

from remoe_edge.cli import cli  # noqa: E402
from remoe_edge.routing.trace import load_trace  # noqa: E402

TEXT = "The router chooses experts. Neighbouring tokens reuse the same experts, or not. " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny_hf.tiny_model("olmoe", tmp_path_factory.mktemp("olmoe"))
    return path


def trace(folder: Path, output: Path, *arguments: str) -> "dict[str, object]":
    result = CliRunner().invoke(cli, ["trace", str(folder), "-o", str(output), "--json", "-t", "1", *arguments])
    assert result.exit_code == 0, result.output
    summary: dict[str, object] = json.loads(result.stdout)
    return summary


def test_own_output(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.npz"
    summary = trace(folder, output, "-p", "Neighbouring tokens", "-p", "reuse", "-n", "6", "--probs")
    recorded = load_trace(output)
    assert recorded.probs is not None
    assert (summary["phase"], summary["tokens"]) == ("decode", recorded.tokens)
    assert len(recorded.offs) == 3
    assert 2 <= recorded.tokens <= 12
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert summary["prompt_tokens"] == sum(map(len, tokenizer(["Neighbouring tokens", "reuse"])["input_ids"]))


def test_given_text(folder: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "trace.npz"
    text.write_text(TEXT)
    summary = trace(folder, output, "--teacher-forced", str(text), "--length", "20", "--prompts", "3")
    assert (summary["phase"], summary["tokens"], summary["sequences"]) == ("teacher-forced", 60, 3)
    assert load_trace(output).meta["text"] == "text.txt"


def test_the_cache_is_the_runtimes(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["trace", str(folder), "-o", str(tmp_path / "t.npz"), "--expert-cache", "4s"])
    assert result.exit_code == 2
    assert "--expert-cache has no effect on a Hugging Face model" in result.stderr
