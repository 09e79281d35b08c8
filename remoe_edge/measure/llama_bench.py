"""The part of a result row that llama-bench has, too, and what tells builds and machines apart."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from remoe_edge.measure.arms import Arm, Options
from remoe_edge.measure.journal import Record
from remoe_edge.measure.worker import Job
from remoe_edge.runtime.wheel import installed_manifest


@cache
def runtime_fields() -> Mapping[str, str | None]:
    manifest = installed_manifest()
    return {
        "runtime_key": manifest.key if manifest else None,
        "patch_hash": manifest.patches if manifest else None,
        "llama_cpp_commit": manifest.llama_cpp if manifest else None,
        "device": f"{cpu_name()} ({platform.machine()})",
    }


def cpu_name() -> str:
    """The board's name where the firmware tells it, as on a Jetson, else the processor's."""
    board = Path("/proc/device-tree/model")
    if board.exists():
        return board.read_text().rstrip("\0")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown CPU")


def llama_bench_fields(arm: Arm, options: Options, records: Sequence[Record], started: str) -> dict[str, Any]:
    """The fields of llama-bench, so that tools made for it can read our rows: one test of prompt and generation."""
    runs = [record.run for record in records if record.run]
    first = runs[0] if runs else None
    gpu = first.gpu if first else None
    job = Job.__dataclass_fields__
    samples = [run.token_ns[-1] for run in runs]
    speeds = [(run.n_prompt + run.n_gen) / run.token_ns[-1] * 1e9 for run in runs]
    return {
        "build_commit": runtime_fields()["llama_cpp_commit"] or "unknown",
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": gpu.device if gpu else "",
        "backends": gpu.backend if gpu else "CPU",
        "model_filename": str(arm.model),
        "model_type": first.model_description if first else None,
        "model_size": first.model_bytes if first else None,
        "model_n_params": first.model_params if first else None,
        "n_batch": job["n_batch"].default,
        "n_ubatch": job["n_ubatch"].default,
        "n_threads": options.n_threads,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": gpu.layers if gpu else 0,
        "n_cpu_moe": 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "mmap" if arm.name == "mmap" else "none",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": arm.repack,
        "fit_target": 0,
        "fit_min_ctx": 0,
        # Of several prompts, the mean.
        "n_prompt": round(statistics.mean(run.n_prompt for run in runs)) if runs else None,
        "n_gen": options.n_gen,
        "n_depth": 0,
        "test_time": started,
        "avg_ns": round(statistics.mean(samples)) if samples else None,
        "stddev_ns": round(statistics.stdev(samples)) if len(samples) > 1 else 0,
        "avg_ts": statistics.mean(speeds) if speeds else None,
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": samples,
        "samples_ts": speeds,
    }
