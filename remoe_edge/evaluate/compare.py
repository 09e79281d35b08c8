"""What changed from a base router to a tuned one on the same text, with intervals.

Intervals are 95 % percentile bootstraps of the paired change. Sequences are drawn, not tokens, because tokens of one
are not independent; each text keeps its number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.evaluate.figures import Figures, Floats

_RESAMPLES = 2000

Draws = npt.NDArray[np.int64]


def compare(
    base: Figures,
    tuned: Figures,
    *,
    strata: Sequence[int] | None = None,
    inside: int | None = None,
    text_bytes: int | None = None,
) -> dict[str, Any]:
    """Figures as the report prints them; changes are relative.

    Parameters
    ----------
    strata
        Sequences of each text, if there are several.
    inside
        Splits perplexity and reuse at this position, for sequences longer than those trained on.
    text_bytes
        Of the predicted tokens, for bits per byte.
    """
    draws = _draws(strata or [len(base)])
    row: dict[str, Any] = {"sequences": len(base), "tokens": base.reuse_steps.size + len(base)}
    row |= _paired("reuse_rate", base.reuse.mean(1), tuned.reuse.mean(1), draws)
    row |= _misses(base, tuned, draws)
    for side, one in ("base", base), ("tuned", tuned):
        row[f"load_cv_{side}"] = float(one.load_cv.mean())
        row[f"load_reuse_{side}"] = float(one.load_reuse.mean())
        row[f"load_entropy_{side}"] = float(one.load_entropy.mean())
        row[f"distinct_experts_{side}"] = float(one.distinct.mean())
        row[f"distinct_experts_least_{side}"] = int(one.distinct.min())
        row[f"routing_entropy_{side}"] = None if one.entropy is None else float(one.entropy.mean())
        row[f"layers_{side}"] = {
            "reuse_rate": one.reuse.mean(0).tolist(),
            "load_cv": one.load_cv.tolist(),
            "load_entropy": one.load_entropy.tolist(),
            "distinct_experts": one.distinct.tolist(),
            "routing_entropy": None if one.entropy is None else one.entropy.tolist(),
        }
    # In points: what of the change in reuse is not the chance that a less even load brings.
    row["reuse_beyond_load_change"] = (row["reuse_rate_tuned"] - row["load_reuse_tuned"]) - (
        row["reuse_rate_base"] - row["load_reuse_base"]
    )
    if base.nll is not None and tuned.nll is not None:
        row |= _quality(base.nll, tuned.nll, draws)
        if text_bytes:
            for side, nll in ("base", base.nll), ("tuned", tuned.nll):
                row[f"bits_per_byte_{side}"] = float(nll.sum() / np.log(2) / text_bytes)
        if inside is not None and inside < base.nll.shape[1]:
            for name, part in ("inside", slice(0, inside)), ("beyond", slice(inside, None)):
                row[name] = _quality(base.nll[:, part], tuned.nll[:, part], draws)
                old, new = (one.reuse_steps[:, part].mean(1) for one in (base, tuned))
                row[name] |= _paired("reuse_rate", old, new, draws)
    if tuned.kl is not None:
        row["kl_mean"] = float(tuned.kl.mean())
        row["kl_p99"] = float(np.quantile(tuned.kl, 0.99))
        row["kl_mean_ci95"] = _interval(tuned.kl.mean(1)[draws].mean(1))
    return row


def over_seeds(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Mean over seeds of a figure, and its 95 % t-interval; None for a single seed."""
    values = np.array([row[key] for row in rows], float)
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "ci95": None, "seeds": values.tolist()}
    half = float(_t95(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "ci95": [mean - half, mean + half], "seeds": values.tolist()}


def _t95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    # Between and beyond these the next smaller one holds: an interval is never too narrow.
    return next(t for least, t in _T95 if freedom >= least)


_T95 = (
    (30, 2.042),
    (20, 2.086),
    (15, 2.131),
    (10, 2.228),
    (9, 2.262),
    (8, 2.306),
    (7, 2.365),
    (6, 2.447),
    (5, 2.571),
    (4, 2.776),
    (3, 3.182),
    (2, 4.303),
    (1, 12.706),
)


def _misses(base: Figures, tuned: Figures, draws: Draws) -> dict[str, Any]:
    """Cold caches are the headline, as in ReMoE."""
    row: dict[str, Any] = {}
    for cache, sizes in base.misses.items():
        suffix = "" if cache == "cold" else f"_{cache}"
        for name in "lru_miss_change", "lru_miss_change_ci95", "lru_hit_rate_base", "lru_hit_rate_tuned":
            row[name + suffix] = {}
        for size, old in sizes.items():
            new = tuned.misses[cache][size]
            found = _paired("x", old, new, draws)
            row[f"lru_miss_change{suffix}"][size] = found["x_change"]
            row[f"lru_miss_change_ci95{suffix}"][size] = found["x_change_ci95"]
            for side, misses in ("base", old), ("tuned", new):
                row[f"lru_hit_rate_{side}{suffix}"][size] = float(1 - misses.mean() / base.uses)
    return row


def _quality(base: Floats, tuned: Floats, draws: Draws) -> dict[str, Any]:
    old, new = base.mean(1), tuned.mean(1)
    return {
        "ppl_base": float(np.exp(old.mean())),
        "ppl_tuned": float(np.exp(new.mean())),
        "ppl_change": float(np.expm1(new.mean() - old.mean())),
        "ppl_delta_ci95": _interval(np.expm1((new - old)[draws].mean(1))),
    }


def _paired(name: str, old: npt.NDArray[Any], new: npt.NDArray[Any], draws: Draws) -> dict[str, Any]:
    """Of values by sequence."""
    return {
        f"{name}_base": float(old.mean()),
        f"{name}_tuned": float(new.mean()),
        f"{name}_change": float(_ratio(old.mean(), new.mean())),
        f"{name}_change_ci95": _interval(_ratio(old[draws].mean(1), new[draws].mean(1))),
    }


def _ratio(old: Any, new: Any) -> Any:
    """A base of nothing gives no change: nothing to reuse, nothing to miss."""
    old, new = np.asarray(old, float), np.asarray(new, float)
    return np.divide(new - old, old, out=np.zeros_like(old), where=old > 0)


def _draws(strata: Sequence[int]) -> Draws:
    """[resamples, rows]: indices of sequences, as many of each text as it has."""
    rng = np.random.default_rng(0)
    parts, start = [], 0
    for count in strata:
        parts.append(start + rng.integers(0, count, (_RESAMPLES, count)))
        start += count
    return np.concatenate(parts, axis=1)


def _interval(values: npt.NDArray[np.floating]) -> list[float]:
    return [float(edge) for edge in np.percentile(values, (2.5, 97.5))]
