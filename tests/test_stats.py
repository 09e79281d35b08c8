import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe_edge.measure.stats import bootstrap_ci95, compare, paired_ratio

times = st.floats(0.1, 1e4)


def test_the_interval_of_known_data() -> None:
    rng = np.random.default_rng(3)
    samples = rng.normal(100, 5, 400).tolist()
    low, high = bootstrap_ci95(samples) or (0, 0)
    # The standard error of the median of normal data is 1.2533 sigma / sqrt(n).
    assert low < np.median(samples) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 5 / 20, rel=0.35)
    assert bootstrap_ci95(samples) == [low, high]
    assert bootstrap_ci95([1.0]) is None
    # Of the mean: sigma / sqrt(n).
    low, high = bootstrap_ci95(samples, mean=True) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * 5 / 20, rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        low, high = bootstrap_ci95(rng.lognormal(3, 0.2, 20).tolist()) or (0, 0)
        held += low <= math.exp(3) <= high
    assert 0.90 <= held / 300 <= 0.99


def test_a_paired_ratio_ignores_what_drifts() -> None:
    rng = np.random.default_rng(5)
    drift = np.exp(np.cumsum(rng.normal(0, 0.2, 30)))
    b = {index: float(100 * factor * rng.normal(1, 0.005)) for index, factor in enumerate(drift)}
    a = {index: float(80 * factor * rng.normal(1, 0.005)) for index, factor in enumerate(drift)}
    ratio = paired_ratio(a, b)
    assert ratio is not None
    assert ratio.ci95 is not None
    assert ratio.pairs == 30
    assert ratio.ratio == pytest.approx(0.8, abs=0.004)
    assert ratio.ci95[0] < 0.8 < ratio.ci95[1]
    assert ratio.ci95[1] - ratio.ci95[0] < 0.01


@given(st.dictionaries(st.integers(0, 9), times, min_size=2), st.floats(0.1, 10))
def test_the_ratio_to_a_scaled_copy_is_the_scale(values: dict[int, float], scale: float) -> None:
    ratio = paired_ratio({key: value * scale for key, value in values.items()}, values)
    assert ratio is not None
    assert ratio.ratio == pytest.approx(scale)
    assert ratio.ci95 == pytest.approx((scale, scale))


def test_pairs_are_those_that_both_have() -> None:
    assert paired_ratio({1: 2.0}, {2: 1.0}) is None
    ratio = paired_ratio({1: 2.0, 2: 9.0}, {1: 1.0})
    assert ratio is not None
    assert (ratio.ratio, ratio.ci95, ratio.pairs) == (2, None, 1)


def test_p_values_of_known_data() -> None:
    # 4 against 4 values that do not overlap: 2 of 70 ways to label them are as extreme.
    change = compare({"a": [1.0, 1.1, 1.2, 1.3]}, {"a": [2.0, 2.1, 2.2, 2.3]})
    assert change.p_value == pytest.approx(2 / 70)
    assert change.p_smallest == pytest.approx(2 / 70)
    assert change.verdict(0.03) == "slower"
    assert compare({"a": [2.0, 2.1, 2.2, 2.3]}, {"a": [1.0, 1.1, 1.2, 1.3]}).verdict(0.03) == "faster"
    # 3 against 3: 2 of 20, which is not below 0.05, however large the difference.
    few = compare({"a": [1.0, 1.1, 1.2]}, {"a": [100.0, 110.0, 120.0]})
    assert few.p_value == pytest.approx(0.1)
    assert few.verdict(0.03) == "too few runs"
    # Two prompts give 20 * 20 ways.
    two = compare({"a": [1.0, 1.1, 1.2], "b": [5.0, 5.5, 6.0]}, {"a": [2.0, 2.1, 2.2], "b": [9.0, 9.5, 10.0]})
    assert two.p_value == pytest.approx(2 / 400)
    # Unequal sides have no mirror image.
    assert compare({"a": [1.0, 1.1]}, {"a": [2.0, 2.1, 2.2]}).p_smallest == pytest.approx(1 / 10)


def test_a_prompt_that_takes_longer_is_no_difference_between_arms() -> None:
    rng = np.random.default_rng(6)
    old, new = ({"short": rng.normal(10, 0.05, 6), "long": rng.normal(90, 0.5, 6)} for _ in range(2))
    change = compare(old, new)
    assert change.ratio == pytest.approx(1, abs=0.01)
    assert change.verdict(0.03) == "equivalent"


@pytest.mark.parametrize("runs", [4, 30])
def test_equal_arms_are_rarely_found_different_and_different_ones_often(runs: int) -> None:
    rng = np.random.default_rng(7)

    def found(scale: float) -> float:
        changes = [
            compare({"p": rng.lognormal(3, 0.02, runs)}, {"p": rng.lognormal(3 + math.log(scale), 0.02, runs)})
            for _ in range(60)
        ]
        return sum(change.p_value < 0.05 for change in changes) / len(changes)

    assert found(1.0) <= 0.13
    assert found(1.08) >= 0.9


@given(st.lists(times, min_size=1, max_size=4), st.lists(times, min_size=1, max_size=4))
def test_changes_are_the_same_both_ways(a: list[float], b: list[float]) -> None:
    there, back = compare({"p": a}, {"p": b}), compare({"p": b}, {"p": a})
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.p_smallest - 1e-12 <= there.p_value <= 1


@given(st.lists(times, min_size=2, max_size=5))
def test_the_same_values_are_no_change(values: list[float]) -> None:
    change = compare({"p": values}, {"p": values})
    assert change.ratio == pytest.approx(1)
    assert change.p_value == 1


def test_intervals_narrow_with_more_runs() -> None:
    rng = np.random.default_rng(8)
    widths = []
    for runs in (5, 20, 80):
        change = compare({"p": rng.lognormal(3, 0.1, runs)}, {"p": rng.lognormal(3, 0.1, runs)})
        assert change.ci95 is not None
        widths.append(change.ci95[1] - change.ci95[0])
    assert all(before > after for before, after in pairwise(widths))


def test_sides_need_the_same_prompts() -> None:
    for old, new in ({}, {}), ({"a": [1.0]}, {"b": [1.0]}), ({"a": [1.0]}, {"a": []}):
        with pytest.raises(ValueError, match="same prompts"):
            compare(old, new)
