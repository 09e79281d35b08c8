"""Power, temperature and memory of a serving machine, now: for its metrics."""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType

from remoe_edge.device.state import temperatures
from remoe_edge.power.source import NoSource, PowerSource

_PERIOD_S = 1.0
_MAX_WATTS = 100_000.0


class LivePower:
    """Reads a power sensor once a second from the start of the context to its end, and keeps the last value and a sum.

    The sampler of `power.sampler` keeps every reading, which a server that runs for months must not.

    Attributes
    ----------
    watts
        The last reading; None if there is no sensor or it fails.
    joules
        Energy since the start.
    """

    def __init__(self, source: PowerSource, period_s: float = _PERIOD_S) -> None:
        self.source = source
        self.watts: float | None = None
        self.joules = 0.0
        self._period_s = max(period_s, source.period_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-power", daemon=True)

    @property
    def available(self) -> bool:
        return not isinstance(self.source, NoSource)

    def __enter__(self) -> LivePower:
        if self.available:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(2 * self._period_s)

    def _run(self) -> None:
        last: tuple[float, float] | None = None
        while not self._stop.wait(self._period_s):
            try:
                value, now = float(self.source.read()), time.monotonic()
            except Exception:  # whatever a sensor does, serving goes on
                self.watts, last = None, None
                continue
            if self.source.counter:
                rise, seconds = (value - last[1], now - last[0]) if last else (math.nan, 1.0)
                watts = rise / seconds
            else:
                watts = value
            if 0 <= watts < _MAX_WATTS:
                self.watts = watts
                self.joules += watts * (now - last[0] if last else 0.0)
            last = now, value
        self.source.close()


def chip_temperatures() -> dict[str, float]:
    """Degrees Celsius by zone, drives left out."""
    return {zone: value for zone, value in temperatures().items() if not zone.startswith("nvme")}
