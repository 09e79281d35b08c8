"""What saves memory must not change what is computed: gradient checkpointing, and experts outside the accelerator."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from accelerate import dispatch_model  # noqa: E402
from tiny_hf import ARCHITECTURES, LAYERS, tiny_model  # noqa: E402

from remoe_edge.tuning.adapters import MoE, adapt  # noqa: E402
from remoe_edge.tuning.data import Sequences  # noqa: E402
from remoe_edge.tuning.load import load_model  # noqa: E402
from remoe_edge.tuning.train import TERMS, TuneConfig, TuneResult, tune  # noqa: E402
from remoe_edge.tuning.weights import Weights  # noqa: E402

STEPS = 2
CONFIG = TuneConfig(
    steps=STEPS,
    learning_rate=0.01,
    warm_up=1,
    local_warm_up=1,
    micro_batch=2,
    accumulation=1,
    check_every=STEPS,
    max_ppl_increase=None,
    weights=Weights(smooth=0.1, lag=0.1, window=0.1),
)


def run(moe: MoE) -> tuple[TuneResult, list[dict[str, float]]]:
    """The result, and of every step what was computed."""
    rng = np.random.default_rng(0)
    rows = Sequences(rng.integers(3, 60, (8, 25)), np.ones((8, 24), np.bool_), {})
    log: list[dict[str, float]] = []
    result = tune(moe, rows, rows.part(slice(0, 2)), CONFIG, on_step=log.append)
    return result, [{term: row[term] for term in (*TERMS, "grad_norm")} for row in log]


def offload_experts(moe: MoE, folder: Path) -> None:
    """As `--experts-on-cpu` does it on a GPU: the modules are empty, and every pass fetches the weights for itself."""
    places = {name: "disk" for name, _ in moe.model.named_modules() if name.endswith(".experts")}
    dispatch_model(moe.model, {"": "cpu", **places}, main_device="cpu", offload_dir=folder, force_hooks=True)


def count_passes(moe: MoE) -> list[int]:
    """How often routers have run, in a list of one number that goes on counting."""
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1

    for router in moe.routers:
        router.module.register_forward_pre_hook(count)
    return passes


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("offloaded", [False, True])
def test_saving_memory_gives_the_same_router(arch: str, offloaded: bool, tmp_path: Path) -> None:
    folder = str(tiny_model(arch, tmp_path))
    plain = adapt(load_model(folder))
    saving = adapt(load_model(folder, gradient_checkpointing=True))
    if offloaded:
        offload_experts(saving, tmp_path / "experts")
        experts = [p for n, p in saving.model.named_parameters() if ".experts." in n]
        assert experts
        assert {p.device.type for p in experts} == {"meta"}
    passes = count_passes(plain), count_passes(saving)
    (expected, steps), (found, same) = run(plain), run(saving)
    assert len(steps) == STEPS
    for step, other in zip(steps, same, strict=True):
        assert other == pytest.approx(step, rel=1e-4)
    assert found.checks[-1].ppl == pytest.approx(expected.checks[-1].ppl, rel=1e-4)
    assert expected.checks[-1].ppl != expected.checks[0].ppl
    # Experts are part of the proof wherever they are.
    assert found.frozen_sha256 == expected.frozen_sha256
    # Every layer ran a second time in the backward pass of each step.
    assert passes[1][0] - passes[0][0] == LAYERS * STEPS
    if offloaded:
        assert {p.device.type for p in experts} == {"meta"}


def test_proof_covers_experts_that_are_not_in_the_module(tmp_path: Path) -> None:
    from remoe_edge.tuning.train import _frozen_hash

    moe = adapt(load_model(str(tiny_model("olmoe", tmp_path))))
    before = _frozen_hash(moe)
    with torch.no_grad():
        next(p for n, p in moe.model.named_parameters() if ".experts." in n)[0, 0, 0] += 1
    offload_experts(moe, tmp_path / "experts")
    assert _frozen_hash(moe) != before
