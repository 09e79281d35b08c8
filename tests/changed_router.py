"""A made-up router change for twins: what a tuning run on another machine would have left."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from remoe_edge.gguf_io.layout import read_model
from remoe_edge.routing.trace import Trace

_MERGED = 16


def write_changed_router(model: Path, trace: Trace, output: Path) -> None:
    """Write the router of a twin of `trace`, changed by `merge_rare_experts`, under its Hugging Face names."""
    (layout,) = read_model(model)
    changed: dict[str, npt.NDArray[np.float32]] = {}
    for layer in range(trace.layers):
        tensor = layout.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        rows = np.fromfile(model, "<f4", int(np.prod(tensor.shape)), offset=tensor.start).reshape(tensor.shape[::-1])
        counts = np.bincount(trace.ids[:, layer].ravel(), minlength=trace.experts)
        changed[f"model.layers.{layer}.mlp.gate.weight"] = merge_rare_experts(rows, counts, _MERGED)
    save_file(changed, output)


def merge_rare_experts(
    router: npt.NDArray[np.float32], counts: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.float32]:
    """A router [experts, hidden] whose `n` least used experts hand their tokens to the `n` most used ones.

    The row of a rare expert is added to that of a frequent one and then turned around, so that nothing chooses it.
    """
    order = np.argsort(counts, kind="stable")
    rare, frequent = order[:n], order[::-1][:n]
    changed: npt.NDArray[np.float32] = router.copy()
    changed[frequent] += router[rare]
    changed[rare] = -router[rare]
    return changed
