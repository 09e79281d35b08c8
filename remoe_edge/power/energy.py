"""Energy of a stretch of time, and of the tokens of a decode run, from a power recording.

Watts are integrated by the trapezoid rule, with values interpolated at the edges; a counter's joules are interpolated
at the edges. What was not measured is None, never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.power.sampler import Recording

_MIN_SAMPLES = 2
_MAX_GAP_PERIODS = 5
_MAX_GAP_SHARE = 0.02


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
    if t1_ns < t0_ns:
        raise ValueError(f"the window ends {t0_ns - t1_ns} ns before it begins")
    seconds = (t1_ns - t0_ns) / 1e9
    at = (recording.t_ns - t0_ns) / 1e9
    inside = (at >= 0) & (at <= seconds)
    samples = int(inside.sum())
    edges = np.concatenate([[0.0], at[inside], [seconds]])
    gap = float(np.diff(edges).max()) if samples else None

    def refused(reason: str) -> WindowEnergy:
        return WindowEnergy(seconds, None, None, None, samples, gap, reason)

    if gap is None or samples < _MIN_SAMPLES:
        return refused(f"{samples} power samples in {seconds:.3g} s; {_MIN_SAMPLES} are needed")
    allowed = max(_MAX_GAP_PERIODS * recording.period_s, _MAX_GAP_SHARE * seconds)
    if gap > allowed:
        return refused(f"a gap of {gap:.3g} s between power samples; at most {allowed:.3g} s are allowed here")
    if recording.joules is None:
        watts = np.interp(edges, at, recording.watts)
        joules = float(((watts[1:] + watts[:-1]) / 2 * np.diff(edges)).sum())
    else:
        joules = _counted(recording, at, seconds) - _counted(recording, at, 0.0)
    if joules <= 0:
        return refused(f"{recording.sensor}: the energy counter did not move")
    return WindowEnergy(seconds, joules, joules / seconds, float(recording.watts[inside].max()), samples, gap, None)


def _counted(recording: Recording, at: npt.NDArray[np.float64], moment: float) -> float:
    """A counter's joules at a moment; before the first and after the last sample, power is taken to stay."""
    assert recording.joules is not None
    inside = np.interp(moment, at, recording.joules)
    before, after = min(0.0, moment - at[0]), max(0.0, moment - at[-1])
    return float(inside + recording.watts[0] * before + recording.watts[-1] * after)


@dataclass(frozen=True)
class RunEnergy:
    """Energy of one decode run.

    Attributes
    ----------
    source, sensor, period_s
        Of the recording.
    status
        "measured", "partial" (decode was, but some readings failed) or "not measured".
    reason
        Why it is not "measured"; else None.
    idle_w
        Power of the machine without the run; None if no idle window was measured.
    joules_per_token, joules_per_token_above_idle
        Of decode, and with `idle_w` subtracted; None where not measured.
    """

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
        """The fields of a result row; None where not measured. Power, samples and gap are those of decode."""
        gap = self.decode.largest_gap_s
        return {
            "power_source": self.source,
            "power_sensor": self.sensor,
            "power_hz": 1 / self.period_s if self.period_s else None,
            "power_status": self.status,
            "power_reason": self.reason,
            "power_samples": self.decode.samples,
            "power_gap_ms_max": None if gap is None else gap * 1e3,
            "power_w_mean": self.decode.mean_w,
            "power_w_max": self.decode.max_w,
            "power_w_idle": self.idle_w,
            "energy_prefill_j": self.prefill.joules,
            "energy_decode_j": self.decode.joules,
            "joules_per_token": self.joules_per_token,
            "joules_per_token_above_idle": self.joules_per_token_above_idle,
        }


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
        When each token was chosen, CLOCK_MONOTONIC; at least one. Prefill is from `start_ns` to the first, decode from
        the first to the last, and joules per token are those of decode over ``len(token_ns) - 1``, as TPOT counts.
    idle_windows
        (start, end) of stretches when the machine idled, best one before and one after the run: the mean of their mean
        powers is the idle power.
    """
    prefill = window_energy(recording, start_ns, token_ns[0])
    decode = window_energy(recording, token_ns[0], token_ns[-1])
    idle = [power for window in idle_windows if (power := window_energy(recording, *window).mean_w) is not None]
    idle_w = sum(idle) / len(idle) if idle else None
    tokens = len(token_ns) - 1
    joules = decode.joules
    above = joules - idle_w * decode.seconds if joules is not None and idle_w is not None else None
    reasons = [reason for reason in (decode.reason, recording.reason) if reason]
    return RunEnergy(
        source=recording.source,
        sensor=recording.sensor,
        period_s=recording.period_s,
        status="not measured" if joules is None else recording.status,
        # Without any sample the sensor's own reason says all.
        reason="; ".join(reasons if len(recording.t_ns) else reasons[-1:]) or None,
        prefill=prefill,
        decode=decode,
        idle_w=idle_w,
        joules_per_token=None if joules is None else joules / tokens,
        joules_per_token_above_idle=None if above is None else above / tokens,
    )
