"""What a run will need, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from remoe_edge.tuning.adapters import MoE
from remoe_edge.tuning.train import TuneConfig


@dataclass(frozen=True)
class Estimate:
    """Bytes and work of a run; activations are a rough upper figure. `host` is what stays in host memory, else 0."""

    weights: int
    host: int
    trained: int
    activations: int
    flops_per_step: float

    @property
    def memory(self) -> int:
        # Gradient and two moments, in FP32, of what trains.
        return self.weights + 4 * 4 * self.trained + self.activations


def estimate(moe: MoE, config: TuneConfig, length: int, *, gradient_checkpointing: bool = False) -> Estimate:
    """From parameter counts: about 2 FLOPs per active weight and token forward and 2 back, since weights are frozen."""
    settings: Any = moe.model.config
    host = sum(p.nbytes for p in moe.model.parameters() if p.is_meta)
    weights = sum(p.nbytes for p in moe.model.parameters()) - host
    if host:
        # One layer's experts computes while the next one's are fetched.
        weights += 2 * host // moe.layers
    trained = sum(p.numel() for p in moe.router_parameters().values())
    total = sum(p.numel() for p in moe.model.parameters())
    experts = sum(p.numel() for n, p in moe.model.named_parameters() if ".experts." in n)
    active = total - experts + experts * moe.top_k // moe.experts
    tokens = config.micro_batch * length
    size = torch.finfo(next(moe.model.parameters()).dtype).bits // 8
    layers = settings.num_hidden_layers
    # A block keeps about 16 vectors of the hidden size, and top_k times an expert's two inner ones.
    inner = int(getattr(settings, "moe_intermediate_size", None) or settings.intermediate_size)
    block = 16 * settings.hidden_size + 3 * moe.top_k * inner
    kept = block + layers * settings.hidden_size if gradient_checkpointing else layers * block
    activations = tokens * (kept * size + 3 * 4 * settings.vocab_size)
    return Estimate(weights, host, trained, activations, 4.0 * active * tokens * config.accumulation)
