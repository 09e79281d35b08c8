"""The same command gives the same bytes, in processes that have only their arguments in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf_maker as make
import pytest
from small_twin import small_trace, write_small_twin

from remoe_edge.routing.trace import load_trace, save_trace
from remoe_edge.runtime.build import ensure_runtime


def twice(folder: Path, output: str, *arguments: object, more: tuple[list[str], list[str]] = ([], [])) -> list[bytes]:
    """What two runs write. They differ in the seed of Python's hashes, the time zone, the folder and `more`."""
    written = []
    for seed, zone in enumerate(("UTC", "Asia/Tokyo")):
        place = folder / f"run {seed}"
        place.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "TZ": zone, "TMPDIR": str(place)}
        command = [sys.executable, "-m", "remoe_edge", *map(str, arguments), *more[seed], "-o", output]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        written.append((place / output).read_bytes())
    return written


def test_convert(tmp_path: Path) -> None:
    base = make.write_base(tmp_path / "base.gguf")
    router = make.write_router(tmp_path / "router.safetensors", make.router_values())
    one, two = twice(tmp_path, "out.gguf", "convert", base, router, "--align", 4096)
    assert one == two


def test_twin(tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "trace.npz")
    one, two = twice(tmp_path, "t.gguf", "twin", tmp_path / "trace.npz", "--hidden", 64, "--ff", 32, "--seed", 3)
    assert one == two


def test_tune(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_hf import tiny_model

    model = tiny_model("olmoe", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The router of a model chooses a few experts for each token. " * 30)
    settings = ["--length", 24, "--steps", 2, "--held-out", 2, "--accumulation", 1, "--check-every", 1, "--lr", 0.01]
    settings += ["--warm-up", 1, "--local-warm-up", 1, "--max-ppl-increase", 1, "--seed", 5]
    one, two = twice(tmp_path, "router.safetensors", "tune", model, "--data", text, *settings)
    assert one == two
    assert os.stat(tmp_path / "run 0" / "router.safetensors").st_mode & 0o044 == 0o044


@pytest.mark.runtime
def test_trace_whatever_the_budget_and_the_threads(tmp_path: Path) -> None:
    """Kernels are the plain ones, and a thread computes whole rows, so neither changes what routers see."""
    ensure_runtime()
    model = write_small_twin(tmp_path / "twin.gguf")
    more = (["--expert-cache", "2s", "-t", "1"], ["--expert-cache", "16s", "-t", "2"])
    one, two = twice(tmp_path, "t.npz", "trace", model, "-p", "w00000", "-n", 24, "--probs", more=more)
    assert one == two
    assert load_trace(tmp_path / "run 0" / "t.npz").tokens == 24


@pytest.mark.runtime
def test_convert_of_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_hf import tiny_model

    model = tiny_model("olmoe", tmp_path / "model")
    one, two = twice(tmp_path, "out.gguf", "convert", model, "--quant", "F16")
    assert one == two
