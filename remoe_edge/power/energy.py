"""Energy of a stretch of time, and of the tokens of a decode run, from a power recording.

Watts are integrated by the trapezoid rule, with values interpolated at the edges; a counter's joules are interpolated
at the edges. What was not measured is None, never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remoe_edge.power.sampler import Recording


@dataclass(frozen=True)
class WindowEnergy:
    """Energy in one window of time.

    Attributes
    ----------
    joules, mean_w, max_w
        None if the window could not be measured.
    samples
        Inside the window.
    largest_gap_s
        Longest time in the window without a sample, its edges included; None without any sample.
    reason
        Why the window was not measured; None if it was.
    """

    seconds: float
    joules: float | None
    mean_w: float | None
    max_w: float | None
    samples: int
    largest_gap_s: float | None
    reason: str | None


def window_energy(recording: Recording, t0_ns: int, t1_ns: int) -> WindowEnergy:
    """Energy between two moments of CLOCK_MONOTONIC.

    A window with fewer than two samples, or with a gap of both more than five periods and more than 2 % of the window,
    is not measured. Raises ValueError if t1_ns < t0_ns.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class RunEnergy:
    """Energy of one decode run. See `run_energy`."""

    source: str
    sensor: str
    period_s: float
    status: str
    reason: str | None
    prefill: WindowEnergy
    decode: WindowEnergy
    idle_w: float | None
    joules_per_token: float | None
    joules_per_token_above_idle: float | None

    def fields(self) -> dict[str, Any]:
        """The fields of a result row; None where not measured."""
        raise NotImplementedError


def run_energy(
    recording: Recording,
    start_ns: int,
    token_ns: Sequence[int],
    idle_windows: Sequence[tuple[int, int]] = (),
) -> RunEnergy:
    """Energy of one decode run.

    Parameters
    ----------
    recording
        Samples that cover the run and the idle windows.
    start_ns
        When the prompt's evaluation began, CLOCK_MONOTONIC.
    token_ns
        When each token was chosen, CLOCK_MONOTONIC. Prefill is from `start_ns` to the first, decode from the first to
        the last, and joules per token are those of decode over ``len(token_ns) - 1``, as TPOT counts.
    idle_windows
        (start, end) of stretches when the machine idled, best one before and one after the run: the mean of their mean
        powers is the idle power.
    """
    raise NotImplementedError
