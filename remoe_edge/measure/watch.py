"""Watches the machine during runs: power, power mode, temperature; and lets it cool down between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from remoe_edge.device.state import Snapshot, same_mode, snapshot, temperature, throttled
from remoe_edge.measure.worker import DecodeRun
from remoe_edge.power.energy import run_energy
from remoe_edge.power.find import find_source
from remoe_edge.power.sampler import Recording, Sampler
from remoe_edge.power.source import NoSource

COOL_MARGIN_C = 3.0
"""A run may begin when the chip is at most this much warmer than before the first run."""

_IDLE_S = 1.0
_IDLE_PERIODS = 5
_CHECK_S = 0.5
_TRACE_POINTS = 400


@dataclass(frozen=True)
class Before:
    """The machine as a run begins. `waited_s` is how long it cooled down, and `note` says if that was not enough."""

    state: Snapshot
    temperature_c: float | None
    idle: tuple[int, int] | None
    waited_s: float
    note: str | None


@dataclass(frozen=True)
class Seen:
    """What happened around a run; `invalid` says why it must not count, None if it may.

    `energy`, `power` and `state` are as in `Record`.
    """

    energy: dict[str, Any] | None
    power: dict[str, list[float]] | None
    state: dict[str, Any]
    invalid: str | None


class Watch:
    """Samples power from the start of the context to its end.

    Parameters
    ----------
    power
        As `find_source` takes it.
    cool_down_s
        Longest wait for the temperature before a run; 0 does not wait.
    reference
        State and temperature before the first run of an interrupted benchmark, which this one goes on with.
    root
        Folder that holds ``sys`` and so on, for tests.

    Raises RemoeError if a sensor asked for by name does not work.
    """

    def __init__(
        self,
        power: str = "auto",
        cool_down_s: float = 60.0,
        reference: tuple[Snapshot, float | None] | None = None,
        *,
        root: Path = Path("/"),
    ) -> None:
        choice = find_source(power, root)
        self._source = choice.source
        self._sampler = Sampler(choice.source)
        self._cool_down_s = cool_down_s
        self._root = root
        self._reference = reference

    def __enter__(self) -> Watch:
        self._sampler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.__exit__(kind, error, trace)

    def before(self, waiting: Callable[[], None] = lambda: None) -> Before:
        """Cool down and measure the idle machine; `waiting` is called meanwhile."""
        if self._reference is None:
            self._reference = snapshot(self._root), temperature(self._root)
        waited, note = self._cool_down(waiting)
        return Before(snapshot(self._root), temperature(self._root), self._idle(), waited, note)

    def after(self, before: Before, run: DecodeRun | None) -> Seen:
        """What was seen since `before`; to be called right after the run."""
        state, degrees = snapshot(self._root), temperature(self._root)
        energy, power = self._energy(before, run)
        assert self._reference is not None
        # Within the run, or since the benchmark began: rows of several modes must not be mixed.
        invalid = same_mode(before.state, state) or same_mode(self._reference[0], state)
        return Seen(
            energy,
            power,
            {
                "before": before.state,
                "after": state,
                "temperature_c": [before.temperature_c, degrees],
                "cooled_down_s": before.waited_s,
                "throttled": throttled(before.state, state),
            },
            invalid,
        )

    def _cool_down(self, waiting: Callable[[], None]) -> tuple[float, str | None]:
        assert self._reference is not None
        start = self._reference[1]
        begin = time.monotonic()
        while True:
            now, waited = temperature(self._root), time.monotonic() - begin
            if start is None or now is None or now <= start + COOL_MARGIN_C:
                return waited, None
            if waited >= self._cool_down_s:
                return waited, (
                    f"after {self._cool_down_s:.0f} s of cooling down the chip was still more than {COOL_MARGIN_C:.0f} "
                    "degrees warmer than before the first run"
                    if self._cool_down_s
                    else None
                )
            waiting()
            time.sleep(min(_CHECK_S, max(0.0, self._cool_down_s - waited)))

    def _idle(self) -> tuple[int, int] | None:
        """A stretch of time in which nothing runs; None without a sensor."""
        if isinstance(self._source, NoSource):
            return None
        begin = time.monotonic_ns()
        time.sleep(max(_IDLE_S, _IDLE_PERIODS * self._source.period_s))
        return begin, time.monotonic_ns()

    def _energy(
        self, before: Before, run: DecodeRun | None
    ) -> tuple[dict[str, Any] | None, dict[str, list[float]] | None]:
        if run is None:
            return None, None
        idle = [window for window in (before.idle, self._idle()) if window]
        recording = self._sampler.recording()
        moments = run.moments_ns
        with suppress(ValueError):
            return run_energy(recording, run.start_ns, moments, idle).fields(), _trace(recording, run.start_ns, moments)
        return None, None


def _trace(recording: Recording, start_ns: int, moments_ns: Sequence[int]) -> dict[str, list[float]] | None:
    """Samples of a run in milliseconds from its start, thinned out, with the times of its tokens."""
    inside = (recording.t_ns >= start_ns) & (recording.t_ns <= moments_ns[-1])
    times, watts = (recording.t_ns[inside] - start_ns) / 1e6, recording.watts[inside]
    if not len(times):
        return None
    step = -(-len(times) // _TRACE_POINTS)
    starts = np.arange(0, len(times), step)
    means = np.add.reduceat(watts, starts) / np.diff([*starts, len(times)])
    return {
        "t_ms": [round(float(value), 1) for value in times[starts]],
        "watts": [round(float(value), 3) for value in means],
        "tokens_ms": [round((moment - start_ns) / 1e6, 1) for moment in moments_ns],
    }
