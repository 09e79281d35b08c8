"""Energy of known waveforms, and windows that must not have one."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_edge.power.energy import run_energy, window_energy
from remoe_edge.power.sampler import Recording

SECOND = 1_000_000_000
BOOT = 86_400 * SECOND


def recorded(
    t_s: np.ndarray, watts: np.ndarray, *, period_s: float = 0.02, joules: np.ndarray | None = None, **more: object
) -> Recording:
    t_ns = BOOT + np.round(np.asarray(t_s) * 1e9).astype(np.int64)
    return Recording("ina3221", "VDD_IN", period_s, t_ns, np.asarray(watts, dtype=float), joules, **more)  # type: ignore[arg-type]


def at(seconds: float) -> int:
    return BOOT + round(seconds * 1e9)


@st.composite
def waveforms(
    draw: st.DrawFn,
) -> tuple[float, Callable[[np.ndarray], np.ndarray], Callable[[float, float], float]]:
    """A sampling period, power over time, and its exact integral: idle, a slope, and two load cycles.

    A cycle is 30 periods or longer (0.6 s at 20 ms): what a sensor is too slow for, no rule can integrate.
    """
    period = draw(st.floats(0.02, 0.1))
    base = draw(st.floats(6, 40))
    slope = draw(st.floats(-0.2, 0.2))
    waves = [(draw(st.floats(0, base / 10)), period * draw(st.floats(30, 500)), draw(st.floats(0, 7))) for _ in "12"]

    def power(t: np.ndarray) -> np.ndarray:
        return base + slope * t + sum(a * np.sin(2 * np.pi * t / cycle + phase) for a, cycle, phase in waves)

    def energy(t0: float, t1: float) -> float:
        total = base * (t1 - t0) + slope * (t1 * t1 - t0 * t0) / 2
        for a, cycle, phase in waves:
            w = 2 * math.pi / cycle
            total += a / w * (math.cos(w * t0 + phase) - math.cos(w * t1 + phase))
        return total

    return period, power, energy


@settings(max_examples=200, deadline=None)
@given(
    waveform=waveforms(),
    seed=st.integers(0, 2**32 - 1),
    jitter=st.floats(0, 0.4),
    lost=st.floats(0, 0.1),
    t0=st.floats(0.5, 3),
    length=st.floats(2, 8),
)
def test_energy_of_a_known_waveform_is_exact_within_half_a_percent(
    waveform: tuple[float, Callable[[np.ndarray], np.ndarray], Callable[[float, float], float]],
    seed: int,
    jitter: float,
    lost: float,
    t0: float,
    length: float,
) -> None:
    period, power, energy = waveform
    chance = np.random.default_rng(seed)
    t = np.arange(0, 12, period)
    t = t + chance.uniform(-jitter, jitter, len(t)) * period
    kept = chance.uniform(size=len(t)) >= lost
    kept[1:] |= ~kept[:-1]  # single readings are lost, never two in a row
    t = t[kept]
    recording = recorded(t, power(t), period_s=period)
    window = window_energy(recording, at(t0), at(t0 + length))
    assert window.joules == pytest.approx(energy(t0, t0 + length), rel=0.005)
    assert window.mean_w == pytest.approx(energy(t0, t0 + length) / length, rel=0.005)
    assert window.samples == ((recording.t_ns >= at(t0)) & (recording.t_ns <= at(t0 + length))).sum()


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.3, 2), st.floats(4, 30)), min_size=4, max_size=8),
    phase=st.floats(0, 0.02, exclude_max=True),
)
def test_energy_of_steps_is_within_a_sample_of_each_step(steps: list[tuple[float, float]], phase: float) -> None:
    ends = np.cumsum([seconds for seconds, _ in steps])
    levels = np.array([watts for _, watts in steps])
    t = np.arange(phase, ends[-1], 0.02)
    window = window_energy(recorded(t, levels[np.searchsorted(ends, t, side="right")]), at(0.02), at(ends[-1] - 0.02))
    exact = sum(s * w for s, w in steps) - 0.02 * (levels[0] + levels[-1])
    assert window.joules is not None
    assert abs(window.joules - exact) <= 0.5 * 0.02 * np.abs(np.diff(levels)).sum() + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    waveform=waveforms(),
    t0=st.floats(0.5, 3),
    length=st.floats(2, 8),
)
def test_energy_from_a_counter_is_exact_within_half_a_percent(
    waveform: tuple[float, Callable[[np.ndarray], np.ndarray], Callable[[float, float], float]],
    t0: float,
    length: float,
) -> None:
    period, _, energy = waveform
    t = np.arange(0, 12, period)
    joules = 1e6 + np.array([energy(0, moment) for moment in t])
    watts = np.diff(joules) / np.diff(t)
    recording = recorded(t, np.concatenate([watts[:1], watts]), period_s=period, joules=joules)
    assert window_energy(recording, at(t0), at(t0 + length)).joules == pytest.approx(energy(t0, t0 + length), rel=0.005)


def test_windows_add_up() -> None:
    t = np.arange(0, 10, 0.02)
    recording = recorded(t, 10 + 5 * np.sin(t))
    joules = [window_energy(recording, at(a), at(b)).joules for a, b in ((1.0, 4.003), (4.003, 9.0), (1.0, 9.0))]
    assert None not in joules
    assert joules[0] + joules[1] == pytest.approx(joules[2], rel=1e-9)  # type: ignore[operator]


def test_values_are_interpolated_at_the_edges() -> None:
    # 0 s: 2 W, 1 s: 4 W, 2 s: 6 W; from 0.5 to 1.5 s it is 3 to 5 W.
    window = window_energy(recorded(np.arange(3), np.array([2.0, 4.0, 6.0]), period_s=1), at(0.5), at(1.5))
    assert (window.samples, window.joules) == (1, None)
    window = window_energy(recorded(np.arange(5), np.array([2.0, 4.0, 6.0, 8.0, 10.0]), period_s=1), at(0.5), at(3.5))
    assert window.joules == pytest.approx(3 * 6.0)
    assert (window.samples, window.max_w, window.largest_gap_s) == (3, 8.0, 1.0)


def test_power_stays_at_an_edge_that_lies_before_the_first_sample() -> None:
    t = np.arange(0.03, 5, 0.02)
    assert window_energy(recorded(t, np.full(len(t), 8.0)), at(0), at(5)).joules == pytest.approx(40.0)
    joules = 8.0 * t
    counter = recorded(t, np.full(len(t), 8.0), joules=joules)
    assert window_energy(counter, at(0), at(5)).joules == pytest.approx(40.0)


def test_fewer_than_two_samples_are_no_measurement() -> None:
    t = np.arange(0, 10, 0.5)
    recording = recorded(t, np.full(len(t), 8.0), period_s=0.5)
    window = window_energy(recording, at(1.1), at(1.9))
    assert (window.joules, window.mean_w, window.max_w, window.samples) == (None, None, None, 1)
    assert window.reason == "1 power samples in 0.8 s; 2 are needed"
    empty = window_energy(recorded(np.zeros(0), np.zeros(0)), at(0), at(1))
    assert (empty.joules, empty.samples, empty.largest_gap_s) == (None, 0, None)


@pytest.mark.parametrize(("gap", "measured"), [(0.15, True), (0.3, False)])
def test_a_gap_that_is_too_large_is_no_measurement(gap: float, measured: bool) -> None:
    # Allowed: the larger of five periods (0.1 s) and 2 % of the window (0.2 s).
    t = np.arange(0, 10, 0.02)
    t = t[(t < 5) | (t > 5 + gap)]
    window = window_energy(recorded(t, np.full(len(t), 8.0)), at(0), at(9.98))
    assert (window.joules is not None) == measured
    assert window.largest_gap_s == pytest.approx(gap, abs=0.041)
    if not measured:
        assert window.reason is not None
        assert "between power samples; at most 0.2 s are allowed here" in window.reason
    # The same gap outside a window does not matter to it.
    assert window_energy(recorded(t, np.full(len(t), 8.0)), at(0.5), at(4.5)).joules == pytest.approx(32.0)


def test_a_sensor_that_ended_early_does_not_cover_the_window() -> None:
    t = np.arange(0, 5, 0.02)
    window = window_energy(recorded(t, np.full(len(t), 8.0)), at(1), at(9))
    assert (window.joules, window.largest_gap_s) == (None, pytest.approx(4.02))


def test_a_counter_that_does_not_move_is_no_measurement() -> None:
    t = np.arange(0, 10, 0.05)
    window = window_energy(recorded(t, np.zeros(len(t)), period_s=0.05, joules=np.full(len(t), 3.0)), at(1), at(9))
    assert (window.joules, window.reason) == (None, "VDD_IN: the energy counter did not move")


def test_a_window_that_ends_before_it_begins_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="before it begins"):
        window_energy(recorded(np.arange(3), np.ones(3)), at(2), at(1))


def a_run() -> tuple[Recording, list[int], list[tuple[int, int]]]:
    """Idle at 4 W until 5 s, prefill at 20 W until 7 s, 41 tokens at 10 W until 15 s, then idle at 5 W until 20 s."""
    t = np.arange(0, 20, 0.02)
    watts = np.select([t < 5, t < 7, t < 15], [4.0, 20.0, 10.0], 5.0)
    tokens = [at(second) for second in np.linspace(7, 15, 41)]
    return recorded(t, watts), tokens, [(at(1), at(4)), (at(16), at(19))]


def test_a_run_has_prefill_and_decode_apart_and_idle_subtracted() -> None:
    recording, tokens, idle = a_run()
    run = run_energy(recording, at(5), tokens, idle)
    assert run.prefill.joules == pytest.approx(40.0, rel=0.005)
    assert run.decode.joules == pytest.approx(80.0, rel=0.005)
    assert run.idle_w == pytest.approx(4.5)
    assert run.joules_per_token == pytest.approx(2.0, rel=0.005)
    assert run.joules_per_token_above_idle == pytest.approx((80 - 4.5 * 8) / 40, rel=0.005)
    assert (run.status, run.reason) == ("measured", None)
    fields = run.fields()
    assert fields["power_sensor"] == "VDD_IN"
    assert fields["power_hz"] == 50
    assert fields["power_samples"] == run.decode.samples
    assert fields["joules_per_token"] == run.joules_per_token
    assert fields["power_gap_ms_max"] == pytest.approx(20, rel=0.01)


def test_without_idle_windows_nothing_is_subtracted() -> None:
    recording, tokens, _ = a_run()
    run = run_energy(recording, at(5), tokens)
    assert (run.idle_w, run.joules_per_token_above_idle) == (None, None)
    assert run.joules_per_token == pytest.approx(2.0, rel=0.005)


def test_what_was_not_measured_is_none_and_never_zero() -> None:
    nothing = Recording("none", "none", 0.0, np.zeros(0, dtype=np.int64), np.zeros(0), reason="no power sensor")
    run = run_energy(nothing, at(0), [at(1), at(2)], [(at(-2), at(-1))])
    assert (run.status, run.reason) == ("not measured", "no power sensor")
    measured = {"power_source", "power_sensor", "power_status", "power_reason", "power_samples"}
    assert {name for name, value in run.fields().items() if value is not None} == measured
    assert run.fields()["power_samples"] == 0


def test_a_run_of_one_token_has_no_decode() -> None:
    recording, tokens, idle = a_run()
    run = run_energy(recording, at(5), tokens[:1], idle)
    assert (run.joules_per_token, run.status) == (None, "not measured")
    assert run.prefill.joules == pytest.approx(40.0, rel=0.005)


def test_failures_outside_of_decode_make_the_run_partial() -> None:
    recording, tokens, idle = a_run()
    failed = Recording(**{**vars(recording), "failed": 3, "reason": "VDD_IN: away"})
    run = run_energy(failed, at(5), tokens, idle)
    assert (run.status, run.reason) == ("partial", "VDD_IN: away")
    assert run.joules_per_token == pytest.approx(2.0, rel=0.005)
