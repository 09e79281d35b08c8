"""What `scripts/soak.py` concludes from its samples, and a short soak of a real server."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_twin import write_small_twin

from remoe_edge.runtime.build import ensure_runtime

SCRIPTS = Path(__file__).parent.parent / "scripts"
MIB = 1 << 20


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("soak")


def lines(growth: float, *, parts: int = 4, seconds: int = 100, **last: Any) -> list[dict[str, Any]]:
    """Samples of one server in parts with pauses, that grows by so many bytes a second of load."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = [{"server": 1, "ready": {}, "memory": 150 * MIB}]
    for part in range(parts):
        for second in range(seconds):
            loaded = part * (seconds - 1) + second
            found.append(
                {
                    "sample": part * 1000.0 + second,
                    "server": 1,
                    "part": part,
                    # The first minute fills caches.
                    "memory": 100 * MIB + min(loaded, 50) * MIB / 10 + growth * loaded + rng.normal(0, 30_000),
                    "group": 50 * MIB,
                    "oom_kills": 0,
                    "restarts": 0.0,
                    **dict.fromkeys(("hits", "misses", "evictions"), float(loaded)),
                }
            )
        found.append({"part": part, "ok": True, "answers": {"chat": 3}})
    found[-2].update(last)
    return found


def test_steady_memory_is_told_from_memory_that_grows(soak: Any) -> None:
    steady = soak.summary(lines(0), 60, 20)
    assert steady["ok"]
    assert (steady["parts"], steady["servers"], steady["answers"], steady["loaded_seconds"]) == (
        4,
        1,
        {"chat": 12},
        396,
    )
    assert steady["growth_bytes_per_hour"]["low"] < 0 < steady["growth_bytes_per_hour"]["high"]
    grows = soak.summary(lines(2000), 60, 20)
    assert not grows["ok"]
    assert grows["growth_bytes_per_hour"]["low"] < 2000 * 3600 < grows["growth_bytes_per_hour"]["high"]


@pytest.mark.parametrize(
    "last",
    [{"oom_kills": 1}, {"restarts": 1.0}, {"memory": 151 * MIB}, {"hits": 0.0}],
    ids=lambda last: next(iter(last)),
)
def test_a_broken_promise_is_no_success(soak: Any, last: dict[str, Any]) -> None:
    assert not soak.summary(lines(0, **last), 60, 20)["ok"]


@pytest.mark.runtime
def test_two_parts_of_a_soak_of_one_server(tmp_path: Path) -> None:
    ensure_runtime()
    model = write_small_twin(tmp_path / "twin.gguf")
    command = [sys.executable, str(SCRIPTS / "soak.py"), str(model), "-o", str(tmp_path / "soak.jsonl")]
    command += ["--seconds", "4", "--clients", "2", "--tokens", "8", "--words", "20", "--memory", "400"]
    # The second one ends the server, whatever the first one says.
    both = [subprocess.run([*command, *more], capture_output=True, text=True, timeout=120) for more in (["--keep"], [])]
    for done in both:
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(both[1].stdout)
    assert (found["parts"], found["servers"], found["oom_kills"]) == (2, 1, 0)
    assert found["hits"] + found["misses"] > 0
    assert found["memory_peak_bytes"] <= 400 * MIB
