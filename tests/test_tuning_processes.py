"""Several processes, started with torchrun, tune as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_hf import tiny_model  # noqa: E402

SENTENCES = ["The router chooses a few experts for each token. ", "Neighbours that reuse the same experts are cheap. "]
# Means over rows of a mean over rows: the same however rows are shared out. L_reuse is a logarithm of a mean, so it is
# left out here.
ARGUMENTS = ["--length", "16", "--steps", "3", "--held-out", "5", "--lr", "0.01", "--warm-up", "1"]
ARGUMENTS += ["--local-warm-up", "1", "--accumulation", "2", "--reuse", "0", "--smooth", "1", "--check-every", "2"]
ARGUMENTS += ["--max-ppl-increase", "-1", "--dtype", "float32"]


def tune(processes: int, model: Path, text: Path, output: Path) -> tuple[list[dict[str, Any]], str]:
    """Two rows at once, in one process or one in each of two; the log and what was said."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [sys.executable, "-W", "ignore", *(torchrun if processes > 1 else []), "-m", "remoe_edge", "tune"]
    command += [str(model), "--data", str(text), "-o", str(output), *ARGUMENTS, "--micro-batch", str(2 // processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    log = output.with_name(output.name + ".work") / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()], done.stderr


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    model = tiny_model("olmoe", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES[i] for i in np.random.default_rng(0).integers(0, 2, 40)))
    one, _ = tune(1, model, text, tmp_path / "one.safetensors")
    two, said = tune(2, model, text, tmp_path / "two.safetensors")
    assert [row["step"] for row in two] == [1, 2, 3]
    for row, other in zip(one, two, strict=True):
        for term in ("loss", "ce", "kl", "smooth", "lag", "window", "reuse_rate", "grad_norm"):
            assert other[term] == pytest.approx(row[term], rel=1e-3, abs=1e-6), term
    # Five held-out rows: one process has three of them, the other two.
    for figure in ("ppl", "kl", "reuse_rate"):
        assert two[-1]["held_out"][figure] == pytest.approx(one[-1]["held_out"][figure], rel=1e-3)
    # One of them speaks.
    assert said.count("reuse rate") == 1
    assert said.count("MoE layers") == 1
