from pathlib import Path

import numpy as np
import pytest
from observe import observe_routing
from tiny_models import (
    DENSE_ARCHITECTURE,
    MOE_ARCHITECTURES,
    STEPS,
    UNKNOWN_ARCHITECTURE,
    VOCABULARY,
    split_model,
    write_tiny_model,
)

pytestmark = pytest.mark.runtime

PROMPT = [259 + step for step in range(0, STEPS, 4)]
FORCED = [259 + step for step in range(1, STEPS, 4)]
N = 16


@pytest.mark.parametrize("quant", ["F32", "Q4_0", "Q4_K", "MXFP4"])
@pytest.mark.parametrize(
    ("arch", "fused", "selection_bias"),
    [
        *((arch, False, False) for arch in MOE_ARCHITECTURES),
        ("deepseek2", True, False),
        ("deepseek2", False, True),
    ],
)
def test_runs_and_routes_variedly(tmp_path: Path, arch: str, fused: bool, selection_bias: bool, quant: str) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", arch, quant, fused=fused, selection_bias=selection_bias)
    seen = observe_routing(model, PROMPT, N, forced=FORCED)
    assert seen.ids.shape == (len(PROMPT) + N - 1, 3, 2)
    assert np.isfinite(seen.logits).all()
    assert 0.3 < seen.logits.std() < 10
    assert len(set(seen.tokens)) > 2
    for layer in range(3):
        assert len(np.unique(seen.ids[:, layer])) >= 8


@pytest.mark.parametrize("arch", MOE_ARCHITECTURES)
def test_seed_changes_the_logits(tmp_path: Path, arch: str) -> None:
    logits = [
        observe_routing(write_tiny_model(tmp_path / f"{seed}.gguf", arch, "Q4_0", seed=seed), PROMPT, 1).logits
        for seed in (0, 1)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "qwen2moe", "Q4_0")
    shards = split_model(model, tmp_path)
    assert [shard.name for shard in shards] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    whole, split = (observe_routing(path, PROMPT, N) for path in (model, shards[0]))
    assert whole.logits.tobytes() == split.logits.tobytes()


def test_dense_model_has_no_routing(tmp_path: Path) -> None:
    seen = observe_routing(write_tiny_model(tmp_path / "m.gguf", DENSE_ARCHITECTURE, "Q4_0"), PROMPT, N)
    assert seen.ids.size == 0
    assert seen.logits.shape == (N, VOCABULARY)


def test_unknown_architecture_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unknown model architecture: 'remoe-unknown'"):
        observe_routing(write_tiny_model(tmp_path / "m.gguf", UNKNOWN_ARCHITECTURE), PROMPT, 1)
