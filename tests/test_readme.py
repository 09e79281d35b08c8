"""The README's commands, run in order as a reader would."""

import gzip
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_edge.demo_model import demo_checkpoint, demo_texts, demo_tuning_text

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
    # What a user brings: a checkpoint, text to tune on, and text that is kept for the evaluation.
    (tmp_path / "my-moe").symlink_to(demo_checkpoint())
    chats = gzip.decompress(demo_tuning_text().read_bytes()).splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_bytes(b"".join(chats[:200]))
    (tmp_path / "held-out.txt").write_text(demo_texts()["stories"].read_text()[:20_000])
    ran = 0
    for words in commands():
        if words[0] != "remoe-edge":
            continue
        result = subprocess.run(
            [sys.executable, "-m", "remoe_edge", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, (words, result.stderr)
        ran += 1
    assert ran == 16
    assert (tmp_path / "tuned.gguf").exists()
    assert (tmp_path / "evaluation" / "eval.md").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
