"""One look at text with one or more routers of the same model: what they choose and what the model predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE, record

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int16]
RouterState = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pass:
    """One router on one text.

    Attributes
    ----------
    nll
        [rows, tokens] nats; of a pass over own output: empty.
    ids
        [rows, tokens, layers, k], most likely first.
    entropy
        [layers], mean entropy of a token's routing distribution over log(experts): 1 is uniform.
    kl
        [rows, tokens] KL(base || this) of the next token in nats; None for the base.
    """

    nll: Floats
    ids: Ints
    entropy: Floats
    kl: Floats | None = field(default=None)


@torch.no_grad()
def set_router(moe: MoE, router: RouterState) -> None:
    """Put router tensors, by checkpoint name, into the model."""
    for name, parameter in moe.router_parameters().items():
        parameter.copy_(router[name])


def router_state(moe: MoE) -> dict[str, Tensor]:
    """A copy of the model's router tensors by checkpoint name."""
    return {name: parameter.detach().clone() for name, parameter in moe.router_parameters().items()}


@torch.no_grad()
def read_text(
    moe: MoE, rows: npt.NDArray[np.int64], routers: Sequence[RouterState], *, batch: int = 4, report: Report = silent
) -> list[Pass]:
    """Teacher-forced passes over rows [rows, tokens + 1] for every router; the first is the base of the others' KL."""
    device = next(moe.model.parameters()).device
    collected: list[list[tuple[Floats, Ints, Floats, Floats]]] = [[] for _ in routers]
    for start in range(0, len(rows), batch):
        report("reading held-out text", start / len(rows))
        ids = torch.from_numpy(rows[start : start + batch]).to(device)
        base: Tensor | None = None
        for index, router in enumerate(routers):
            set_router(moe, router)
            with record(moe) as routings:
                logs = moe.model(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            nll = -logs.gather(-1, ids[:, 1:, None])[..., 0]
            base = logs if base is None else base
            kl = (base.exp() * (base - logs)).sum(-1)
            shape = (len(ids), ids.shape[1] - 1, -1)
            chosen = torch.stack([routing.ids.view(shape) for routing in routings], 2)
            entropy = torch.stack([_entropy(routing.probs).mean() for routing in routings])
            collected[index].append(
                (nll.cpu().numpy(), chosen.cpu().numpy().astype(np.int16), entropy.cpu().numpy(), kl.cpu().numpy())
            )
    passes = []
    for index, parts in enumerate(collected):
        nlls, chosens, entropies, kls = zip(*parts, strict=True)
        sizes = [len(part) for part in nlls]
        passes.append(
            Pass(
                np.concatenate(nlls),
                np.concatenate(chosens),
                np.average(entropies, axis=0, weights=sizes),
                np.concatenate(kls) if index else None,
            )
        )
    return passes


@torch.no_grad()
def write_text(moe: MoE, prompts: npt.NDArray[np.int64], n: int, router: RouterState) -> Pass:
    """The routing of the model's own greedy output: `n` tokens after each of prompts [rows, tokens]."""
    set_router(moe, router)
    device = next(moe.model.parameters()).device
    ids = torch.from_numpy(prompts).to(device)
    steps, entropies = [], []
    out = moe.model(input_ids=ids, use_cache=True)
    for _ in range(n):
        token = out.logits[:, -1:].argmax(-1)
        with record(moe) as routings:
            out = moe.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(torch.stack([routing.ids for routing in routings], 1))
        entropies.append(torch.stack([_entropy(routing.probs).mean() for routing in routings]))
    chosen = torch.stack(steps, 1).cpu().numpy().astype(np.int16)
    return Pass(np.zeros((0, 0), np.float32), chosen, torch.stack(entropies).mean(0).cpu().numpy())


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = -(probs * (probs + 1e-12).log()).sum(-1)
    return entropy / math.log(probs.shape[-1])
