"""The losses of ReMoE (arXiv 2605.27081, section 3), as this project defines them where the paper leaves things open.

Probabilities are [rows, tokens, experts] of one layer: sequences do not see each other, so that no loss connects the
last token of one with the first of the next. A loss is a mean over tokens and sequences; the caller means over layers.
Nothing here has a weight: weights belong to `Weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAGS = (1, 2, 4, 8, 16)
"""Distances at which `lag_loss` compares tokens."""
EPSILON = 1e-8


def trust_loss(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean of KL(P || P_ref), P first, for logits [..., experts]; no gradient flows into `reference`.

    Both come from the same hidden state: the anchor holds the router's map, not what earlier layers do.
    """
    log_p, log_q = logits.log_softmax(-1), reference.detach().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def reuse_loss(probs: Tensor, ids: Tensor) -> Tensor:
    """-log of the mean mass, over K, that a token gives to the experts of the token before it.

    `ids` [rows, tokens, k] are the chosen experts; which they were has no gradient. 0 for sequences of one token.
    """
    if probs.shape[1] < 2:
        return probs.new_zeros(())
    mass = probs[:, 1:].gather(-1, ids[:, :-1]).sum(-1) / ids.shape[-1]
    return -torch.log(mass.mean() + EPSILON)


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), halved, over the last axis."""
    difference = (p + EPSILON).log() - (q + EPSILON).log()
    return 0.5 * ((p - q) * difference).sum(-1)


def smooth_loss(probs: Tensor) -> Tensor:
    """Mean symmetric KL of neighbours; both move."""
    return lag_loss(probs, (1,))


def lag_loss(probs: Tensor, lags: Sequence[int] = LAGS) -> Tensor:
    """Mean symmetric KL over several distances; those longer than the sequence do not count."""
    parts = [symmetric_kl(probs[:, lag:], probs[:, :-lag]).mean() for lag in lags if lag < probs.shape[1]]
    return torch.stack(parts).mean() if parts else probs.new_zeros(())


def window_loss(probs: Tensor, window: int) -> Tensor:
    """Mean entropy, in nats, of the mean distribution in windows of `window` tokens; a last part window counts too."""
    chunks = torch.split(probs, window, dim=1)
    means = torch.stack([chunk.mean(1) for chunk in chunks], 1)
    entropy = -(means * (means + EPSILON).log()).sum(-1)
    sizes = torch.tensor([chunk.shape[1] for chunk in chunks], device=probs.device)
    return (entropy * sizes).sum() / (sizes.sum() * len(probs))


@torch.no_grad()
def reuse_rate(ids: Tensor) -> float:
    """EOR of ids [rows, tokens, k]: the part of a token's experts that the token before it had chosen, mean."""
    if ids.shape[1] < 2:
        return 0.0
    shared = (ids[:, 1:, :, None] == ids[:, :-1, None, :]).any(-1)
    return float(shared.float().mean())
