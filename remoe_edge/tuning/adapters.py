"""Where the routers of a transformers model are, and what they choose.

Every supported architecture has one router module per MoE layer that takes hidden states and returns logits, the
weights of the chosen experts, and their ids. What differs is below, one line each: how scores come from logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from remoe_edge.errors import RemoeError


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sigmoid(logits: Tensor) -> Tensor:
    # Scores of DeepSeek-V3 do not sum to 1; the losses want a distribution.
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "olmoe": _softmax,
    "qwen2_moe": _softmax,
    "qwen3_moe": _softmax,
    "deepseek_v2": _softmax,
    "deepseek_v3": _sigmoid,
    "gpt_oss": _softmax,
    "mixtral": _softmax,
}
_CHECKPOINT_NAMES = {"mixtral": (".mlp.", ".block_sparse_moe.")}
# What transformers renames between its modules and the checkpoint.
SUPPORTED = tuple(_PROBABILITIES)
"""Values of `model_type` in the configuration of supported models."""


@dataclass(frozen=True)
class Router:
    """The router of one MoE layer. `name` is that of its tensors in a checkpoint, `model.layers.3.mlp.gate`."""

    layer: int
    name: str
    module: nn.Module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Weight [experts, hidden], with gpt_oss also bias [experts], by the name they have in a checkpoint."""
        return {f"{self.name}.{name}": parameter for name, parameter in self.module.named_parameters()}


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did in one forward pass. `tokens` are all of a batch, row after row.

    Attributes
    ----------
    hidden
        [tokens, hidden] FP32, what the router saw.
    logits
        [tokens, experts] FP32, with gradient.
    ids
        [tokens, k], the chosen experts, the most likely first.
    """

    hidden: Tensor
    logits: Tensor
    ids: Tensor
    _score: Callable[[Tensor], Tensor] = field(repr=False)

    @cached_property
    def probs(self) -> Tensor:
        """[tokens, experts] FP32, a distribution, with gradient.

        Made when it is asked for, outside of the model: gradient checkpointing runs the model's code a second time and
        wants the same operations, whether something listens or not.
        """
        return self._score(self.logits)


@dataclass
class MoE:
    """A model's routers. Make it with `adapt`."""

    model: nn.Module
    model_type: str
    experts: int
    top_k: int
    routers: tuple[Router, ...]
    _recording: list[Routing] | None = field(default=None, repr=False)

    @property
    def layers(self) -> int:
        return len(self.routers)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., experts] from logits of that shape."""
        return _PROBABILITIES[self.model_type](logits)

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """All router parameters by their name in a checkpoint."""
        return {name: p for router in self.routers for name, p in router.parameters.items()}


def adapt(model: nn.Module) -> MoE:
    """Find the routers of a transformers model, and let them compute in FP32 whatever the model's type is.

    Raises RemoeError for a model without experts and for an architecture that is not supported.
    """
    config: Any = model.config
    model_type = str(config.model_type)
    if model_type not in _PROBABILITIES:
        raise RemoeError(
            f"models of type '{model_type}' cannot be tuned; supported are {', '.join(SUPPORTED)} "
            "(transformers' model_type)"
        )
    routers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("topkrouter") and isinstance(getattr(module, "weight", None), Tensor)
    ]
    if not routers:
        raise RemoeError(f"this {model_type} model has no layer with experts: there is no router to tune")
    first: Any = routers[0][1]
    renamed = _CHECKPOINT_NAMES.get(model_type, ("", ""))
    moe = MoE(
        model,
        model_type,
        int(first.num_experts),
        int(first.top_k),
        tuple(Router(layer, name.replace(*renamed), module) for layer, (name, module) in enumerate(routers)),
    )
    for router in moe.routers:
        _compute_in_fp32(moe, router.module)
    return moe


def _compute_in_fp32(moe: MoE, module: Any) -> None:
    """Make a router FP32, also under autocast, and let it note what it does while something listens."""
    module.float()
    original = module.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            seen = hidden.float()
            logits, weights, ids = original(seen)
            if moe._recording is not None:
                # Some routers leave the order open.
                order = weights.detach().argsort(dim=-1, descending=True, stable=True)
                moe._recording.append(
                    Routing(seen.reshape(-1, seen.shape[-1]), logits, ids.gather(-1, order), moe.probabilities)
                )
        return logits, weights.to(hidden.dtype), ids

    module.forward = forward


@contextmanager
def record(moe: MoE) -> Iterator[list[Routing]]:
    """A list that every forward pass inside fills, one entry per MoE layer in order; clear it between passes."""
    if moe._recording is not None:
        raise RuntimeError("this model is being recorded already")
    moe._recording = []
    try:
        yield moe._recording
    finally:
        moe._recording = None


def fresh_cache(model: Any) -> dict[str, Any]:
    """Arguments that give a model an empty key-value cache, to be passed at every step of one sequence.

    transformers 5.24 renamed the argument, and 5.40 will not know the old name.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=model.config), "use_cache": True}
