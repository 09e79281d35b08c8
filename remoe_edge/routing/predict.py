"""From misses to bytes and time per token.

T_resident is the time per token with all experts in memory, B the bandwidth of the storage. No engine with these
misses can be faster than max(T_resident, bytes / B): reads and compute overlap wholly. One that overlaps nothing takes
T_resident + bytes / B. A real run lies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remoe_edge.errors import RemoeError
from remoe_edge.routing.trace import Trace
from remoe_edge.runtime.budget import ExpertGroup


@dataclass(frozen=True)
class Tpot:
    """Milliseconds per token: with full overlap of reads and compute, and with none."""

    limit_ms: float
    no_overlap_ms: float


def bytes_per_token(layer_misses: Sequence[float], expert_bytes: Sequence[int]) -> float:
    """Bytes to read, from misses per token and bytes of an expert in each layer."""
    return sum(misses * size for misses, size in zip(layer_misses, expert_bytes, strict=True))


def predict_tpot(resident_ms: float, bytes_read: float, bytes_per_s: float) -> Tpot:
    """The time per token that ``bytes_read`` bytes per token allow."""
    read_ms = bytes_read / bytes_per_s * 1e3
    return Tpot(max(resident_ms, read_ms), resident_ms + read_ms)


def check_model_of(trace: Trace, groups: Sequence[ExpertGroup], model: str) -> None:
    """Raise RemoeError unless a trace can be one of a model with these MoE layers."""
    layers = {(group.experts, group.top_k) for group in groups}
    if len(groups) != trace.layers or layers != {(trace.experts, trace.top_k)}:
        told = " and ".join(f"top {top_k} of {experts}" for experts, top_k in sorted(layers))
        raise RemoeError(
            f"{trace.origin}: has {trace.layers} layers with top {trace.top_k} of {trace.experts} experts, but {model} "
            f"has {len(groups)} with {told}; give the trace of this model"
        )
