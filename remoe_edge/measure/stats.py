"""Statistics of repeated runs: intervals, paired ratios, and whether two benchmarks differ.

Intervals are percentile bootstraps (Efron, 1979); p-values come from permutations of the runs within each prompt, all
of them where there are few (Fisher, 1935). Everything is deterministic: resampling has a fixed seed.
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
_MOST_PERMUTATIONS = 20_000
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Of two arms that ran side by side: the geometric mean of the ratios of their pairs.

    `ci95` is its 95 % interval, None for fewer than two pairs.
    """

    ratio: float
    ci95: tuple[float, float] | None
    pairs: int


@dataclass(frozen=True)
class Change:
    """From one benchmark to another.

    Attributes
    ----------
    ratio
        New over old; above 1 is slower if the values are times.
    ci95
        95 % bootstrap interval of the ratio; None if a side has a single run of each prompt.
    p_value
        Two-sided: how often relabelled runs differ at least as much as these.
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
    draws = np.random.default_rng(0).choice(np.asarray(samples), (_RESAMPLES, len(samples)))
    values = draws.mean(axis=1) if mean else np.median(draws, axis=1)
    return [float(edge) for edge in np.percentile(values, (2.5, 97.5))]


def paired_ratio(values: Mapping[Any, float], others: Mapping[Any, float]) -> Ratio | None:
    """How `values` compare with `others` that were measured beside them, by key; None without a common key.

    What drifts between repetitions, such as heat, touches both sides of a pair and cancels out.
    """
    keys: list[Hashable] = [key for key in values if key in others]
    if not keys:
        return None
    logs = [math.log(values[key] / others[key]) for key in keys]
    interval = bootstrap_ci95(logs, mean=True)
    edges = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return Ratio(math.exp(sum(logs) / len(logs)), edges, len(keys))


def compare(old: Samples, new: Samples) -> Change:
    """The change of the geometric mean from `old` to `new`, each prompt with the same weight.

    Both must have the same prompts, each with at least one value; raises ValueError if not.
    """
    if not old or set(old) != set(new) or not all(all(map(len, side.values())) for side in (old, new)):
        raise ValueError("both sides need values of the same prompts")
    pairs = [(np.log(np.asarray(old[prompt], float)), np.log(np.asarray(new[prompt], float))) for prompt in old]
    difference = _mean_difference(pairs)
    p_value, p_smallest = _permutation_test(pairs, difference)
    return Change(
        ratio=math.exp(difference),
        ci95=_ratio_interval(pairs),
        p_value=p_value,
        p_smallest=p_smallest,
        runs=(sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)),
    )


def _mean_difference(pairs: Sequence[tuple[_Array, _Array]]) -> float:
    return float(np.mean([b.mean() - a.mean() for a, b in pairs]))


def _ratio_interval(pairs: Sequence[tuple[_Array, _Array]]) -> tuple[float, float] | None:
    if any(min(len(a), len(b)) < 2 for a, b in pairs):
        return None
    rng = np.random.default_rng(0)
    differences = np.zeros(_RESAMPLES)
    for a, b in pairs:
        differences += rng.choice(b, (_RESAMPLES, len(b))).mean(axis=1)
        differences -= rng.choice(a, (_RESAMPLES, len(a))).mean(axis=1)
    low, high = np.exp(np.percentile(differences / len(pairs), (2.5, 97.5)))
    return float(low), float(high)


def _permutation_test(pairs: Sequence[tuple[_Array, _Array]], difference: float) -> tuple[float, float]:
    """The p-value of a mean difference, and the smallest one possible."""
    choices = [math.comb(len(a) + len(b), len(b)) for a, b in pairs]
    # With equal sides, exchanging all labels gives the same difference with the other sign.
    mirrored = all(len(a) == len(b) for a, b in pairs)
    smallest = min(1.0, (2 if mirrored else 1) / math.prod(choices))
    # Differences that are equal on paper must not count as smaller because of rounding.
    threshold = abs(difference) * (1 - 1e-9) - 1e-12
    if math.prod(choices) <= _MOST_PERMUTATIONS:
        each = [np.fromiter(_relabelled(a, b), float) for a, b in pairs]
        differences = np.zeros(1)
        for one in each:
            differences = np.add.outer(differences, one).ravel()
        extreme = np.abs(differences) / len(pairs) >= threshold
        return float(extreme.mean()), smallest
    rng = np.random.default_rng(0)
    differences = np.zeros(_RESAMPLES)
    for a, b in pairs:
        pool = rng.permuted(np.tile(np.concatenate([a, b]), (_RESAMPLES, 1)), axis=1)
        differences += pool[:, len(a) :].mean(axis=1) - pool[:, : len(a)].mean(axis=1)
    extreme = np.abs(differences) / len(pairs) >= threshold
    return float((extreme.sum() + 1) / (_RESAMPLES + 1)), max(smallest, 1 / (_RESAMPLES + 1))


def _relabelled(a: _Array, b: _Array) -> Iterator[float]:
    """The difference of means for every way to call as many of the values "new"."""
    pool = np.concatenate([a, b])
    total = float(pool.sum())
    for chosen in itertools.combinations(range(len(pool)), len(b)):
        part = float(pool[list(chosen)].sum())
        yield part / len(b) - (total - part) / len(a)
