"""What every power sensor looks like to the sampler."""

from abc import ABC, abstractmethod

from remoe_edge.errors import RemoeError


class SensorError(RemoeError):
    """A sensor that cannot be used, or gave no usable value; the text says which file or program, and why."""


class PowerSource(ABC):
    """One power sensor.

    Attributes
    ----------
    name
        Of the interface, as `find_source` takes it: "ina3221", "powercap", ...
    sensor
        What is measured: the rail's label, such as "VDD_IN"; labels joined by " + " where their sum is read.
    period_s
        Shortest sensible time between two readings, in seconds.
    counter
        False: `read` returns watts. True: `read` returns joules since some fixed moment, and never falls.
    paced
        True: `read` itself waits for the sensor's next value, so the sampler does not wait between readings.
    """

    name: str
    sensor: str
    period_s: float
    counter: bool = False
    paced: bool = False

    @abstractmethod
    def read(self) -> float:
        """Watts, or joules of a `counter`. Raises SensorError or OSError if there is no usable value now.

        Called from one thread only. May be called again after an error: a sensor may come back.
        """

    def close(self) -> None:  # noqa: B027 - most sensors hold nothing open
        """Release what the source holds. Called from the thread that reads, or when none does."""


class NoSource(PowerSource):
    """No sensor. A sampler of it records nothing, and says why."""

    name = "none"
    sensor = "none"
    period_s = 0.0

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def read(self) -> float:
        raise SensorError(self.reason)
