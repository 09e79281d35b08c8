"""The sampler: even intervals on the shared clock, and a run that goes on whatever the sensor does."""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from remoe_edge.power.energy import window_energy
from remoe_edge.power.sampler import Recording, Sampler
from remoe_edge.power.source import NoSource, PowerSource, SensorError


class Scripted(PowerSource):
    """A sensor whose n-th reading is `value(n)`, which may raise or wait."""

    name = "scripted"
    sensor = "VDD_IN"
    period_s = 0.005

    def __init__(self, value: Callable[[int], float], *, counter: bool = False) -> None:
        self.value = value
        self.counter = counter
        self.readings = 0
        self.closed = False

    def read(self) -> float:
        self.readings += 1
        return self.value(self.readings - 1)

    def close(self) -> None:
        self.closed = True


def record(source: PowerSource, seconds: float = 0.15, patience_s: float = 1.0) -> Recording:
    with Sampler(source, patience_s=patience_s) as sampler:
        time.sleep(seconds)
    return sampler.recording()


def test_samples_lie_on_the_clock_that_processes_share() -> None:
    clock = [sys.executable, "-c", "import time; print(time.monotonic_ns())"]
    source = Scripted(lambda n: 5.0)
    with Sampler(source) as sampler:
        time.sleep(0.05)
        middle = int(subprocess.run(clock, capture_output=True, check=True).stdout)
        time.sleep(0.05)
    recording = sampler.recording()
    assert recording.t_ns[0] < middle < recording.t_ns[-1]
    assert (np.diff(recording.t_ns) > 0).all()
    assert set(recording.watts) == {5.0}
    assert (recording.status, recording.failed, recording.reason) == ("measured", 0, None)
    assert source.closed


def test_the_period_is_kept_and_never_caught_up_with() -> None:
    recording = record(Scripted(lambda n: time.sleep(0.05) or 5.0 if n == 3 else 5.0), 0.3)
    # A busy machine samples less often, never more.
    assert 10 < len(recording.t_ns) <= 62
    assert recording.largest_gap_s is not None
    assert recording.largest_gap_s > 0.02


def test_a_sensor_that_vanishes_midway_leaves_what_was_measured() -> None:
    def value(n: int) -> float:
        if n >= 10:
            raise OSError(19, "No such device", "/sys/class/hwmon/hwmon1/in1_input")
        return 7.0

    source = Scripted(value)
    recording = record(source)
    assert (recording.status, len(recording.t_ns)) == ("partial", 10)
    assert recording.failed == source.readings - 10 > 0
    assert recording.reason == "[Errno 19] No such device: '/sys/class/hwmon/hwmon1/in1_input'"
    whole = window_energy(recording, int(recording.t_ns[0]), int(recording.t_ns[0]) + 150_000_000)
    assert (whole.joules, whole.mean_w, whole.max_w) == (None, None, None)
    assert whole.reason is not None
    assert "gap" in whole.reason


def test_a_sensor_that_comes_back_is_read_again() -> None:
    def value(n: int) -> float:
        if 3 <= n < 6:
            raise SensorError("VDD_IN: away")
        return 7.0

    recording = record(Scripted(value))
    assert (recording.failed, recording.status, recording.reason) == (3, "partial", "VDD_IN: away")
    assert len(recording.t_ns) > 6


def test_a_sensor_that_stalls_does_not_hold_up_the_run() -> None:
    released = threading.Event()

    def value(n: int) -> float:
        if n == 5:
            released.wait(30)
        return 7.0

    source = Scripted(value)
    begin = time.monotonic()
    recording = record(source, 0.3, patience_s=0.1)
    assert time.monotonic() - begin < 2
    assert (recording.status, len(recording.t_ns)) == ("partial", 5)
    assert recording.reason is not None
    assert "did not answer for 0." in recording.reason
    released.set()


def test_a_reading_that_took_too_long_has_no_time_and_does_not_count() -> None:
    recording = record(Scripted(lambda n: time.sleep(0.2) or 7.0 if n == 5 else 7.0), 0.5, patience_s=0.1)
    assert (recording.failed, recording.status) == (1, "partial")
    assert len(recording.t_ns) > 6


@pytest.mark.parametrize("garbage", [0.0, -3.0, math.nan, math.inf, 1e9])
def test_watts_that_cannot_be_are_no_samples(garbage: float) -> None:
    recording = record(Scripted(lambda n: 7.0 if n % 2 else garbage))
    assert set(recording.watts) == {7.0}
    assert recording.failed > 1
    assert recording.reason == f"VDD_IN: the sensor gave {garbage} W, which cannot be"


def test_a_sensor_that_never_works_is_not_measured() -> None:
    def broken(_: int) -> float:
        raise KeyError("a bug of a library, not of ours")

    recording = record(Scripted(broken))
    assert (recording.status, len(recording.t_ns), recording.largest_gap_s) == ("not measured", 0, None)
    assert recording.reason == "'a bug of a library, not of ours'"


def test_a_counter_gives_the_mean_power_between_readings() -> None:
    start = time.monotonic()
    recording = record(Scripted(lambda n: 40.0 * (time.monotonic() - start), counter=True))
    assert recording.joules is not None
    assert np.median(recording.watts) == pytest.approx(40.0, rel=0.02)
    assert len(recording.watts) == len(recording.joules) == len(recording.t_ns)


def test_a_counter_that_falls_is_garbage() -> None:
    recording = record(Scripted(lambda n: 1.0 if n == 5 else 10.0 + n, counter=True))
    assert recording.failed == 1
    assert recording.reason == "VDD_IN: the energy counter gave 1.0 J, after a higher value"


def test_without_a_sensor_nothing_runs_and_the_reason_stays() -> None:
    threads = threading.active_count()
    with Sampler(NoSource("no power sensor works here")) as sampler:
        assert threading.active_count() == threads
    recording = sampler.recording()
    assert (recording.status, recording.reason) == ("not measured", "no power sensor works here")
    assert recording.source == "none"


def test_an_exception_of_the_run_goes_through_and_ends_the_thread() -> None:
    source = Scripted(lambda n: 7.0)
    with pytest.raises(KeyboardInterrupt), Sampler(source):
        raise KeyboardInterrupt
    assert source.closed
