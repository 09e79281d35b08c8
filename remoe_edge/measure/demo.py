"""The main job on what comes with the package: a twin, a changed router exported into it, decode runs under a limit.

The twin has the routing of a real model and random weights, so times, reads and hits are real, and its text is not. The
router change is made up: it lets a trace reuse more experts, as tuning does, and shows the way through `convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, cache_dir
from remoe_edge.gguf_io.convert import convert
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.arms import Options
from remoe_edge.measure.bench import Result, bench
from remoe_edge.measure.rows import Row
from remoe_edge.measure.workloads import single_prompt
from remoe_edge.progress import Report, silent
from remoe_edge.routing.trace import Trace, packaged_trace
from remoe_edge.routing.twin import plan_twin, write_twin
from remoe_edge.runtime.llama import default_threads

# Experts a quarter the size of OLMoE's make a file of about 1 GB.
_FF = 256
_BUDGETS = ("8s", "12s", "16s")
_MEMORY_LIMIT = 512 << 20
_PROMPT = "w00000"
# Stock mmap reads most of the file for each token: few are enough, and more would take minutes.
_N_GEN = 16
_MERGED = 16
_ROUTER = "blk.{}.ffn_gate_inp.weight"


@dataclass(frozen=True)
class Demo:
    """`models` are the base and the one with the changed router."""

    models: tuple[Path, Path]
    result: Result
    memory_limit: int


def run_demo(report: Report = silent) -> Demo:
    """Make both models in the cache folder, the twin only where missing, and measure them.

    Raises RemoeError if a run fails, or if what a model puts out depends on how its experts are held.
    """
    trace = packaged_trace()
    folder = cache_dir() / "demo" / f"{trace.digest()[:12]}-ff{_FF}-{__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    base, router, tuned = folder / "base.gguf", folder / "router.safetensors", folder / "tuned.gguf"
    if not base.exists():
        twin = plan_twin(trace, ff=_FF)
        write_twin(twin, base, progress=lambda written: report("writing the twin", written / twin.nbytes))
    write_changed_router(base, trace, router)
    convert(base, router, tuned, force=True, progress=lambda done, total: report("exporting the router", done / total))
    options = Options(
        models=(base, tuned),
        workload=single_prompt(_PROMPT),
        n_gen=_N_GEN,
        n_threads=default_threads(),
        budgets=_BUDGETS,
        baselines=("mmap", "resident"),
        memory_limit=_MEMORY_LIMIT,
    )
    result = bench(options, report)
    check_identical(result.rows)
    return Demo((base, tuned), result, _MEMORY_LIMIT)


def write_changed_router(model: Path, trace: Trace, output: Path) -> None:
    """Write the router of a twin of `trace`, changed by `merge_rare_experts`, under its Hugging Face names."""
    (layout,) = read_model(model)
    changed: dict[str, npt.NDArray[np.float32]] = {}
    for layer in range(trace.layers):
        tensor = layout.tensors[_ROUTER.format(layer)]
        rows = np.fromfile(model, "<f4", int(np.prod(tensor.shape)), offset=tensor.start).reshape(tensor.shape[::-1])
        counts = np.bincount(trace.ids[:, layer].ravel(), minlength=trace.experts)
        changed[f"model.layers.{layer}.mlp.gate.weight"] = merge_rare_experts(rows, counts, _MERGED)
    with atomic_output(output, force=True) as temporary:
        save_file(changed, temporary)


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


def check_identical(rows: Sequence[Row]) -> None:
    """Raise RemoeError unless every row succeeded, and those of one model agree in all tokens and all logits."""
    expected: dict[str, tuple[str, str]] = {}
    for row in rows:
        name = f"{Path(row['model_path']).name}, {row['arm']} {row['budget'] or ''}".rstrip()
        if row["status"] != "ok":
            raise RemoeError(f"{name}: {row['status']}: {row['reason']}")
        output = row["output_sha256"], row["logits_sha256"]
        if output != expected.setdefault(row["model_path"], output):
            raise RemoeError(f"{name}: its output differs from that of the model's other runs, which must not happen")
