"""A twin that decodes in milliseconds: 3 MoE layers of 16 experts, 2 of them used for each token."""

from pathlib import Path

import numpy as np

from remoe_edge.routing.trace import Trace
from remoe_edge.routing.twin import plan_twin, write_twin

LAYERS, EXPERTS, TOP_K, STEPS = 3, 16, 2, 64


def small_trace() -> Trace:
    rng = np.random.default_rng(1)
    ids = np.array([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(STEPS)], dtype=np.uint16)
    meta = {"model": "made up", "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "phase": "decode"}
    return Trace(ids=ids, offs=np.array([0, STEPS]), meta=meta)


def write_small_twin(path: Path) -> Path:
    write_twin(plan_twin(small_trace(), hidden=256, ff=256), path)
    return path
