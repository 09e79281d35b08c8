"""The README's commands, run in order as a reader would."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from changed_router import write_changed_router

from remoe_edge.routing.trace import packaged_trace

ROOT = Path(__file__).parent.parent


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_make_targets_exist() -> None:
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.runtime
@pytest.mark.timeout(900)
def test_commands_work(tmp_path: Path) -> None:
    ran = 0
    for words in commands():
        if words[0] != "remoe-edge":
            continue
        if words[1:3] == ["convert", "base.gguf"] and not (tmp_path / "router.safetensors").exists():
            # What a tuning run on another machine would have left.
            write_changed_router(tmp_path / "base.gguf", packaged_trace(), tmp_path / "router.safetensors")
        result = subprocess.run(
            [sys.executable, "-m", "remoe_edge", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, (words, result.stderr)
        ran += 1
    assert ran == 11
    assert (tmp_path / "tuned.gguf").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
