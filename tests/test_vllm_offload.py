"""The vLLM benchmark against a stand-in server process, and its parser against streams as vLLM sends them."""

import json
import os
import sys
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_vllm_offload import main, parse_stream

from remoe_edge.errors import RemoeError


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_vllm.py")} "$@"\n')
    program.chmod(0o755)
    return program


def lines(*texts: str, usage: bool = True, done: bool = True) -> list[bytes]:
    events = [{"choices": [{"index": 0, "text": text}], "usage": None} for text in texts]
    if usage:
        events.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}})
    sent = [line for event in events for line in (f"data: {json.dumps(event)}\n".encode(), b"\n")]
    return [*sent, *([b"data: [DONE]\n"] if done else [])]


def test_times_of_a_stream() -> None:
    ticks = count(10)
    found = parse_stream([b": ping\n", *lines("a", "", "b", "cd")], lambda: next(ticks), 8.0)
    # Tokens at 10, 11 and 12 s; the request began at 8. The server counted 5 tokens in 3 pieces.
    assert (found.ttft_ms, found.total_ms, found.gaps_ms) == (2000, 4000, [1000, 1000])
    assert found.tpot_ms == 2000 / 4
    assert (found.text, found.n_prompt, found.n_gen) == ("abcd", 3, 5)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([], "ended before"),
        (lines("a", done=False), "ended before"),
        (lines("a", usage=False), "ended before"),
        (lines(""), "ended before"),
        ([b"data: {oops\n"], "not JSON"),
        ([b'data: {"error": {"message": "out of memory"}}\n'], "out of memory"),
    ],
)
def test_a_stream_that_breaks_is_an_error(stream: list[bytes], message: str) -> None:
    with pytest.raises(RemoeError, match=message):
        parse_stream(stream, lambda: 0.0, 0.0)


def test_base_and_tuned_take_turns(vllm: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["slow-base", "tuned", "--cpu-offload-gb", "2.5", "--workload", "text", "--prompts", "2", "-n", "6"]
    done = CliRunner().invoke(
        main,
        [*arguments, "--vllm", str(vllm), "-o", str(output), "--", "--max-model-len", "64"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["base", "tuned", "tuned", "base"]
    assert {row["vllm"] for row in rows} == {"0.11.0"}
    for row in rows:
        assert row["requests"] == 2
        assert (20 if row["arm"] == "base" else 5) <= row["tpot_ms"] < 200
        assert row["output_tokens_per_s"] == pytest.approx(12e3 / sum(answer["total_ms"] for answer in row["answers"]))
    assert "TPOT tuned / base 0." in done.output
    assert "4 pairs" in done.output
    # Every server has ended.
    log = (tmp_path / "rows.jsonl.log").read_text()
    assert log.count("serving slow-base 64") == log.count("serving tuned 64") == 2
    running = [
        Path("/proc", name, "cmdline").read_bytes() for name in os.listdir("/proc") if name.isdigit() and _mine(name)
    ]
    assert not any(b"fake_vllm" in command for command in running)


def _mine(process: str) -> bool:
    try:
        return b"fake_vllm" in Path("/proc", process, "cmdline").read_bytes()
    except OSError:
        return False


def test_a_server_that_fails_says_why(vllm: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    arguments = ["broken", "tuned", "--cpu-offload-gb", "2.5", "--vllm", str(vllm), "-o", str(output)]
    with pytest.raises(RemoeError, match=r"status 1: torch\.OutOfMemoryError: CUDA out of memory"):
        CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert not output.exists()
    with pytest.raises(RemoeError, match="install vLLM"):
        CliRunner().invoke(main, [*arguments, "--vllm", "/nowhere/vllm"], catch_exceptions=False)
