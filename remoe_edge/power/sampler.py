"""A thread that reads one power sensor at even intervals, on the clock of the token log.

That clock is CLOCK_MONOTONIC (`time.monotonic_ns`), which all processes of a Linux machine share.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from remoe_edge.power.source import NoSource, PowerSource, SensorError

_MAX_WATTS = 100_000.0
_PATIENCE_PERIODS = 4


@dataclass(frozen=True)
class Recording:
    """What a sampler saw.

    Attributes
    ----------
    source, sensor, period_s
        Of the `PowerSource`.
    t_ns
        int64 [samples]: CLOCK_MONOTONIC, rising. The middle of a reading; the end of one that waits for its value.
    watts
        float64 [samples], finite, and above zero unless from a counter, where it is the mean since the sample before.
    joules
        float64 [samples] of a counter; None of a sensor that gives watts.
    failed
        Readings without a usable value.
    reason
        The first failure, as a sentence; None if there was none.
    """

    source: str
    sensor: str
    period_s: float
    t_ns: npt.NDArray[np.int64]
    watts: npt.NDArray[np.float64]
    joules: npt.NDArray[np.float64] | None = None
    failed: int = 0
    reason: str | None = None

    @property
    def status(self) -> str:
        """ "measured", "partial" (some readings failed, or the sensor stopped answering) or "not measured"."""
        if len(self.t_ns) < 2:
            return "not measured"
        return "measured" if self.reason is None else "partial"

    @property
    def largest_gap_s(self) -> float | None:
        """Longest time between two samples; None with fewer than two."""
        return float(np.diff(self.t_ns).max()) / 1e9 if len(self.t_ns) > 1 else None


class Sampler:
    """Samples `source` from the start of the context to its end::

        with Sampler(find_source().source) as sampler:
            ...  # work
        recording = sampler.recording()

    Never raises because of the sensor: what goes wrong with it is told by the recording. `recording` may also be
    called while the context is open, for what there is so far. The source is closed at the end of the context.
    """

    def __init__(self, source: PowerSource, *, period_s: float | None = None, patience_s: float = 1.0) -> None:
        """`period_s` overrides the period of the source; a sensor that takes longer than `patience_s` has stalled."""
        self._source = source
        self._period_s = source.period_s if period_s is None else period_s
        self._patience_s = max(patience_s, _PATIENCE_PERIODS * self._period_s)
        self._final: Recording | None = None
        self._samples: list[tuple[int, float]] = []
        self._failed = 0
        self._reason: str | None = source.reason if isinstance(source, NoSource) else None
        self._asked_ns = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        if not isinstance(self._source, NoSource):
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            # A thread that the sensor holds up is left behind; it ends with the process at the latest.
            self._thread.join(self._patience_s)
        self._final = self._record()

    def recording(self) -> Recording:
        """What was sampled so far."""
        return self._final or self._record()

    def _record(self) -> Recording:
        samples = list(self._samples)
        t_ns = np.array([t for t, _ in samples], dtype=np.int64)
        values = np.array([value for _, value in samples], dtype=np.float64)
        joules = values if self._source.counter else None
        reason, asked = self._reason, self._asked_ns
        if reason is None and asked and (waited := (time.monotonic_ns() - asked) / 1e9) >= self._patience_s:
            reason = self._stalled(waited)
        return Recording(
            source=self._source.name,
            sensor=self._source.sensor,
            period_s=self._period_s,
            t_ns=t_ns,
            watts=values if joules is None else _watts(t_ns, joules),
            joules=joules,
            failed=self._failed,
            reason=reason,
        )

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._sample()
            if not self._source.paced:
                # What was missed is not caught up with: readings in a burst would tell nothing new.
                due = max(due + self._period_s, time.monotonic())
                self._stop.wait(due - time.monotonic())
        self._source.close()

    def _sample(self) -> None:
        begin = self._asked_ns = time.monotonic_ns()
        try:
            value = float(self._source.read())
            end = time.monotonic_ns()
            if (waited := (end - begin) / 1e9) >= self._patience_s:
                raise SensorError(self._stalled(waited))
            self._check(value)
        except Exception as error:  # whatever a sensor does, the run it accompanies goes on
            self._failed += 1
            self._reason = self._reason or str(error) or type(error).__name__
            if self._source.paced:
                self._stop.wait(self._period_s)
        else:
            self._samples.append((end if self._source.paced else (begin + end) // 2, value))
        finally:
            self._asked_ns = 0

    def _stalled(self, seconds: float) -> str:
        return f"{self._source.sensor}: the sensor did not answer for {seconds:.1f} s"

    def _check(self, value: float) -> None:
        if self._source.counter:
            if not math.isfinite(value) or (self._samples and value < self._samples[-1][1]):
                raise SensorError(f"{self._source.sensor}: the energy counter gave {value} J, after a higher value")
        elif not 0 < value < _MAX_WATTS:
            raise SensorError(f"{self._source.sensor}: the sensor gave {value} W, which cannot be")


def _watts(t_ns: npt.NDArray[np.int64], joules: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean power between samples of a counter, each at the end of its interval; the first as the second."""
    if len(t_ns) < 2:
        return np.zeros(0)
    means = np.diff(joules) / (np.diff(t_ns) / 1e9)
    return np.concatenate([means[:1], means])
