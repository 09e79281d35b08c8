"""The policies of the simulator and of the runtime evict the same experts: both against the same recorded victims.

python tests/test_policy_vectors.py    # records them anew, when a policy has changed on purpose
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoe_edge.routing.policies import Layer
from remoe_edge.routing.simulate import layer_events, replay_layer
from remoe_edge.routing.trace import packaged_trace
from remoe_edge.runtime.build import ensure_runtime

VECTORS = Path(__file__).parent / "data" / "policy_victims.txt"
POLICIES = ("lru", "lfu", "next-use")
MODEL_LAYER, TOKENS = 7, 150


def recorded() -> Iterator[str]:
    """Lines in the form that test-expert-policy.cpp describes, of one layer of the packaged trace."""
    trace = packaged_trace()
    events = layer_events(trace, MODEL_LAYER)[:TOKENS]
    for policy in POLICIES:
        for slots in (8, 16, 24):
            yield f"policy {policy} {trace.experts} {trace.top_k} {slots}"
            layer = Layer(trace.experts, trace.top_k, slots, events)
            for event, (_, _, victims) in zip(events, replay_layer(layer, policy), strict=True):
                assert event
                yield " ".join(map(str, [*event, *([":", *victims] if victims else [])]))


def test_the_simulator_evicts_what_was_recorded() -> None:
    assert list(recorded()) == VECTORS.read_text().splitlines()


@pytest.mark.runtime
def test_the_runtime_evicts_what_was_recorded(tmp_path: Path) -> None:
    program = ensure_runtime().bin_dir / "test-expert-policy"
    result = subprocess.run([program, VECTORS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("OK: ")

    # One other victim is seen.
    lines = VECTORS.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if ":" in line)
    experts, _, victims = lines[index].partition(":")
    lines[index] = f"{experts}: {int(victims.split()[0]) + 1}"
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("\n".join(lines))
    result = subprocess.run([program, wrong], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"wrong.txt:{index + 1}: other victims" in result.stderr


if __name__ == "__main__":
    VECTORS.write_text("\n".join(recorded()) + "\n")
    sys.stdout.write(f"{VECTORS}\n")
