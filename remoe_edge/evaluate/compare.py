"""What changed from a base router to a tuned one on the same text, with intervals.

Everything is a mean over layers and over the tokens of sequences that start cold; resampling is by sequence, because
tokens of one are not independent. Intervals are 95 % percentile bootstraps of the paired difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.evaluate.lru import cold_misses
from remoe_edge.evaluate.passes import Pass

FRACTIONS = (1, 2, 3, 4)
"""Eighths of the experts that have a slot, for `lru_miss_change`."""
_RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingFigures:
    """Routing of one pass, by sequence where a bootstrap needs it.

    Attributes
    ----------
    reuse
        [rows, layers], EOR: |E_t and E_(t-1)| / K, mean over the steps of a sequence.
    misses
        By slots, [rows, layers] misses of a cold event-atomic LRU cache.
    load_cv
        [layers], standard deviation over mean of how often experts are used.
    load_entropy
        [layers], entropy of these frequencies over log(experts): 1 is even.
    distinct
        [layers], experts used at all.
    """

    reuse: Floats
    misses: dict[int, Floats]
    load_cv: Floats
    load_entropy: Floats
    distinct: npt.NDArray[np.int64]


def slots_for(experts: int, top_k: int) -> dict[str, int]:
    """Slots per layer by C/E, "1/8" to "1/2", never fewer than a token needs; C = K beside them."""
    names = ("1/8", "1/4", "3/8", "1/2")
    found = {name: max(top_k, experts * part // 8) for name, part in zip(names, FRACTIONS, strict=True)}
    return {"C=K": top_k, **found}


def routing_figures(ids: npt.NDArray[np.integer], experts: int) -> RoutingFigures:
    """Figures of ids [rows, tokens, layers, k]."""
    k = ids.shape[3]
    shared = (ids[:, 1:, :, :, None] == ids[:, :-1, :, None, :]).any(-1).mean(axis=(1, 3))
    sizes = sorted(set(slots_for(experts, k).values()))
    misses = dict(zip(sizes, cold_misses(ids, experts, sizes).astype(np.float64), strict=True))
    counts = np.stack([np.bincount(ids[:, :, layer].ravel(), minlength=experts) for layer in range(ids.shape[2])])
    part = counts / counts.sum(1, keepdims=True)
    entropy = -(part * np.log(np.where(part > 0, part, 1))).sum(1) / np.log(experts)
    return RoutingFigures(shared, misses, counts.std(1) / counts.mean(1), entropy, (counts > 0).sum(1))


def compare(base: Pass, tuned: Pass, experts: int, *, inside: int | None = None) -> dict[str, Any]:
    """The figures of one text; keys as the report prints them.

    `inside` splits perplexity and reuse at that position, for sequences longer than those trained on.
    """
    k = base.ids.shape[3]
    a, b = routing_figures(base.ids, experts), routing_figures(tuned.ids, experts)
    draws = np.random.default_rng(0).integers(0, len(base.ids), (_RESAMPLES, len(base.ids)))
    row: dict[str, Any] = {
        "sequences": len(base.ids),
        "tokens": int(base.ids.shape[0] * base.ids.shape[1]),
        "reuse_rate_base": float(a.reuse.mean()),
        "reuse_rate_tuned": float(b.reuse.mean()),
        "reuse_rate_change": float(b.reuse.mean() / a.reuse.mean() - 1),
        "reuse_rate_change_ci95": _interval(b.reuse.mean(1)[draws].mean(1) / a.reuse.mean(1)[draws].mean(1) - 1),
        "reuse_rate_per_layer_base": a.reuse.mean(0).tolist(),
        "reuse_rate_per_layer_tuned": b.reuse.mean(0).tolist(),
        "lru_miss_change": {},
        "lru_miss_change_ci95": {},
        "lru_hit_rate_base": {},
        "lru_hit_rate_tuned": {},
    }
    uses = base.ids.shape[0] * base.ids.shape[1] * base.ids.shape[2] * k
    for name, slots in slots_for(experts, k).items():
        old, new = a.misses[slots].sum(1), b.misses[slots].sum(1)
        row["lru_miss_change"][name] = float(new.sum() / old.sum() - 1)
        row["lru_miss_change_ci95"][name] = _interval(new[draws].sum(1) / old[draws].sum(1) - 1)
        row["lru_hit_rate_base"][name] = float(1 - old.sum() / uses)
        row["lru_hit_rate_tuned"][name] = float(1 - new.sum() / uses)
    for key, attribute in ("load_cv", "load_cv"), ("load_entropy", "load_entropy"), ("distinct_experts", "distinct"):
        row[f"{key}_base"] = float(getattr(a, attribute).mean())
        row[f"{key}_tuned"] = float(getattr(b, attribute).mean())
    row["routing_entropy_base"] = float(base.entropy.mean())
    row["routing_entropy_tuned"] = float(tuned.entropy.mean())
    if base.nll.size:
        row |= _quality(base, tuned, draws)
        if inside is not None and inside < base.nll.shape[1]:
            for name, part in ("inside", slice(0, inside)), ("beyond", slice(inside, None)):
                row[f"ppl_base_{name}"] = float(np.exp(base.nll[:, part].mean()))
                row[f"ppl_tuned_{name}"] = float(np.exp(tuned.nll[:, part].mean()))
                for side, one in ("base", base), ("tuned", tuned):
                    now, before = one.ids[:, part][:, 1:], one.ids[:, part][:, :-1]
                    row[f"reuse_rate_{side}_{name}"] = float((now[..., :, None] == before[..., None, :]).any(-1).mean())
    return row


def _quality(base: Pass, tuned: Pass, draws: npt.NDArray[np.int64]) -> dict[str, Any]:
    old, new = base.nll.mean(1), tuned.nll.mean(1)
    row: dict[str, Any] = {
        "ppl_base": float(np.exp(old.mean())),
        "ppl_tuned": float(np.exp(new.mean())),
        "ppl_change": float(np.exp(new.mean() - old.mean()) - 1),
        "ppl_delta_ci95": _interval(np.exp((new - old)[draws].mean(1)) - 1),
    }
    if tuned.kl is not None:
        row["kl_mean"] = float(tuned.kl.mean())
        row["kl_p99"] = float(np.quantile(tuned.kl, 0.99))
    return row


def over_seeds(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Mean over seeds of a figure, and its 95 % t-interval; None for a single seed."""
    values = np.array([row[key] for row in rows])
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "ci95": None, "seeds": values.tolist()}
    half = float(_T95[min(len(values) - 1, len(_T95)) - 1] * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "ci95": [mean - half, mean + half], "seeds": values.tolist()}


# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def mcnemar(base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, Any]:
    """Exact McNemar test of right answers to the same items: how often each side alone is right, and the p-value."""
    from math import comb

    lost = sum(a and not b for a, b in zip(base, tuned, strict=True))
    won = sum(b and not a for a, b in zip(base, tuned, strict=True))
    n = lost + won
    tail = sum(comb(n, i) for i in range(min(lost, won) + 1)) / 2**n
    return {
        "items": len(base),
        "base": sum(base) / max(1, len(base)),
        "tuned": sum(tuned) / max(1, len(tuned)),
        "base_only": lost,
        "tuned_only": won,
        "p_value": min(1.0, 2 * tail),
    }


def _interval(values: npt.NDArray[np.floating]) -> list[float]:
    return [float(edge) for edge in np.percentile(values, (2.5, 97.5))]
