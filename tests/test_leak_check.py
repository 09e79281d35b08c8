"""What `scripts/leak_check.py` makes of valgrind's report; the check itself takes minutes and is run by hand."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remoe_edge.errors import RemoeError

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def leak_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("leak_check")


def error(kind: str, size: int, blocks: int, *functions: str) -> str:
    """An error as valgrind 3.19 writes it."""
    frames = "".join(f"<frame><ip>0x1</ip><obj>/x/libllama.so</obj><fn>{name}</fn></frame>" for name in functions)
    what = f"<text>{size} bytes</text><leakedbytes>{size}</leakedbytes><leakedblocks>{blocks}</leakedblocks>"
    return f"<error><kind>{kind}</kind><xwhat>{what}</xwhat><stack>{frames}</stack></error>"


def report(*errors: str) -> str:
    return f"<?xml version='1.0'?><valgrindoutput>{''.join(errors)}</valgrindoutput>"


def test_what_is_lost_in_every_cycle_is_told_from_what_is_lost_once(leak_check: Any) -> None:
    text = report(
        error("Leak_DefinitelyLost", 1600, 100, "malloc", "llama_vocab::impl::load"),
        error("Leak_IndirectlyLost", 24, 1, "malloc", "llama_model_load"),
        error("Leak_PossiblyLost", 304, 100, "pthread_create", "llama_expert_cache::allocate(int)"),
        error("UninitCondition", 0, 0, "llama_expert_cache::begin"),
    )
    losses = list(leak_check.read_losses(text))
    assert [each.kind for each in losses] == ["definite", "indirect", "possible"]
    assert losses[0].frames[1] == "llama_vocab::impl::load (libllama.so)"
    sums, faults = leak_check.judge(losses, 100)
    assert sums == {
        "definite_bytes": 1600,
        "indirect_bytes": 24,
        "possible_bytes": 304,
        "own_bytes": 0,
        "bytes_per_cycle": 16.0,
    }
    assert faults == losses[:1]


@pytest.mark.parametrize("function", ["llama_experts::load", "ranking_lru::use", "ggml_backend_cpu_expert_buffer"])
def test_in_our_own_functions_once_is_too_often(leak_check: Any, function: str) -> None:
    losses = list(leak_check.read_losses(report(error("Leak_DefinitelyLost", 8, 1, "malloc", function))))
    sums, faults = leak_check.judge(losses, 100)
    assert (sums["own_bytes"], sums["bytes_per_cycle"], faults) == (8, 0, losses)


def test_a_report_that_is_cut_off_is_no_good_one(leak_check: Any) -> None:
    with pytest.raises(RemoeError, match="cut off"):
        list(leak_check.read_losses(report()[:-20]))


def test_without_valgrind_it_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "leak_check.py", "--cycles", "2"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (77, "valgrind is missing: apt install valgrind\n")
