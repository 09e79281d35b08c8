"""Statistics of repeated runs: intervals, paired ratios, and whether two benchmarks differ.

Intervals are percentile bootstraps (Efron, 1979). Ratios are estimated by Hodges and Lehmann (1963) on logarithms:
nearly as precise as a mean, and one run that something disturbed does not move them. P-values are those of the rank sum
test within prompts (Wilcoxon, 1945; van Elteren, 1960), by permutation: all of them where there are few. Everything is
deterministic: resampling has a fixed seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = Mapping[str, Sequence[float]]
"""Positive values of repeated runs, by prompt."""

SIGNIFICANT = 0.05

_RESAMPLES = 10_000
_SHIFT_RESAMPLES = 2_000
_MOST_PERMUTATIONS = 20_000
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Of two arms that ran side by side. `ci95` is its 95 % interval, None for fewer than two pairs."""

    ratio: float
    ci95: tuple[float, float] | None
    pairs: int


@dataclass(frozen=True)
class Change:
    """From one benchmark to another.

    Attributes
    ----------
    ratio
        New over old, the mean over prompts; above 1 is slower if the values are times.
    ci95
        95 % bootstrap interval of the ratio; None if a side has a single run of each prompt.
    p_value
        Two-sided: how often relabelled runs differ in rank at least as much as these.
    p_smallest
        The smallest p-value that so many runs could give.
    runs
        On the two sides.
    """

    ratio: float
    ci95: tuple[float, float] | None
    p_value: float
    p_smallest: float
    runs: tuple[int, int]

    def verdict(self, margin: float) -> str:
        """ "equivalent" (the whole interval lies within the margin), "slower", "faster", "unclear", or "too few runs".

        `margin` 0.03 means: ratios from 1 / 1.03 to 1.03 do not matter.
        """
        if self.p_smallest >= SIGNIFICANT or self.ci95 is None:
            return "too few runs"
        if 1 / (1 + margin) < self.ci95[0] and self.ci95[1] < 1 + margin:
            return "equivalent"
        if self.p_value < SIGNIFICANT:
            return "slower" if self.ratio > 1 else "faster"
        return "unclear"


def bootstrap_ci95(samples: Sequence[float], *, mean: bool = False) -> list[float] | None:
    """95 % interval of the median, or of the mean, [low, high]; None for fewer than two samples.

    With fewer than six samples it can be no wider than their range, and covers less than it says.
    """
    if len(samples) < 2:
        return None
    draws = _resampled(np.asarray(samples), np.random.default_rng(0))
    values = draws.mean(axis=1) if mean else np.median(draws, axis=1)
    return [float(edge) for edge in np.percentile(values, (2.5, 97.5))]


def paired_ratio(values: Mapping[Any, float], others: Mapping[Any, float]) -> Ratio | None:
    """How `values` compare with `others` that were measured beside them, by key; None without a common key.

    What drifts between repetitions, such as heat, touches both sides of a pair and cancels out.
    """
    keys: list[Hashable] = [key for key in values if key in others]
    if not keys:
        return None
    logs = np.log([values[key] / others[key] for key in keys])
    edges = None
    if len(keys) > 1:
        low, high = np.exp(
            np.percentile(_center(_resampled(logs, np.random.default_rng(0), _SHIFT_RESAMPLES)), (2.5, 97.5))
        )
        edges = float(low), float(high)
    return Ratio(float(np.exp(_center(logs[np.newaxis])[0])), edges, len(keys))


def compare(old: Samples, new: Samples) -> Change:
    """The change from `old` to `new`, each prompt with the same weight.

    Both must have the same prompts, each with at least one value; raises ValueError if not.
    """
    if not old or set(old) != set(new) or not all(all(map(len, side.values())) for side in (old, new)):
        raise ValueError("both sides need values of the same prompts")
    pairs = [(np.log(np.asarray(old[prompt], float)), np.log(np.asarray(new[prompt], float))) for prompt in old]
    shift = np.mean([_shift(a[np.newaxis], b[np.newaxis])[0] for a, b in pairs])
    p_value, p_smallest = _rank_sum_test(pairs)
    return Change(
        ratio=math.exp(shift),
        ci95=_shift_interval(pairs),
        p_value=p_value,
        p_smallest=p_smallest,
        runs=(sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)),
    )


def _resampled(values: _Array, rng: np.random.Generator, times: int = _RESAMPLES) -> _Array:
    drawn: _Array = rng.choice(values, (times, len(values)))
    return drawn


def _center(values: _Array) -> _Array:
    """Hodges-Lehmann estimate of each row: the median of the means of all pairs, each value with itself included."""
    i, j = np.triu_indices(values.shape[1])
    center: _Array = np.median((values[:, i] + values[:, j]) / 2, axis=1)
    return center


def _shift(a: _Array, b: _Array) -> _Array:
    """Hodges-Lehmann shift from each row of `a` to that of `b`: the median of all differences."""
    differences = b[:, :, np.newaxis] - a[:, np.newaxis, :]
    shift: _Array = np.median(differences.reshape(len(a), -1), axis=1)
    return shift


def _shift_interval(pairs: Sequence[tuple[_Array, _Array]]) -> tuple[float, float] | None:
    if any(min(len(a), len(b)) < 2 for a, b in pairs):
        return None
    rng = np.random.default_rng(0)
    shifts = sum(
        _shift(_resampled(a, rng, _SHIFT_RESAMPLES), _resampled(b, rng, _SHIFT_RESAMPLES)) for a, b in pairs
    ) / len(pairs)
    low, high = np.exp(np.percentile(shifts, (2.5, 97.5)))
    return float(low), float(high)


def _rank_sum_test(pairs: Sequence[tuple[_Array, _Array]]) -> tuple[float, float]:
    """The p-value of the difference in mean rank, summed over prompts, and the smallest one possible."""
    choices = [math.comb(len(a) + len(b), len(b)) for a, b in pairs]
    # With equal sides, exchanging all labels gives the same difference with the other sign.
    mirrored = all(len(a) == len(b) for a, b in pairs)
    smallest = min(1.0, (2 if mirrored else 1) / math.prod(choices))
    ranks = [(_ranks(np.concatenate([a, b])), len(b)) for a, b in pairs]
    found = sum(_rank_difference(pool[np.newaxis], count)[0] for pool, count in ranks)
    # Differences that are equal on paper must not count as smaller because of rounding.
    threshold = abs(found) - 1e-9
    differences = np.zeros(1)
    if math.prod(choices) <= _MOST_PERMUTATIONS:
        for pool, count in ranks:
            differences = np.add.outer(differences, np.fromiter(_relabelled(pool, count), float)).ravel()
        return float((np.abs(differences) >= threshold).mean()), smallest
    rng = np.random.default_rng(0)
    for pool, count in ranks:
        shuffled = rng.permuted(np.tile(pool, (_RESAMPLES, 1)), axis=1)
        differences = differences + _rank_difference(shuffled, count)
    extreme = int((np.abs(differences) >= threshold).sum())
    return (extreme + 1) / (_RESAMPLES + 1), max(smallest, 1 / (_RESAMPLES + 1))


def _ranks(values: _Array) -> _Array:
    """From 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: _Array = (last - (counts - 1) / 2)[inverse.ravel()]
    return ranks


def _rank_difference(pools: _Array, count: int) -> _Array:
    """Mean of the last `count` of each row minus the mean of the others."""
    difference: _Array = pools[:, -count:].mean(axis=1) - pools[:, :-count].mean(axis=1)
    return difference


def _relabelled(pool: _Array, count: int) -> Iterator[float]:
    """The difference of means for every way to call `count` of the values "new"."""
    total = float(pool.sum())
    for chosen in itertools.combinations(pool.tolist(), count):
        part = math.fsum(chosen)
        yield part / count - (total - part) / (len(pool) - count)
