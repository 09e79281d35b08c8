import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_jetson import VDD_IN_WATTS, orin_nx, write
from records import MS, RUN

from remoe_edge.errors import RemoeError
from remoe_edge.measure.watch import Watch
from remoe_edge.measure.worker import DecodeRun

ZONE = "sys/class/thermal/thermal_zone4/temp"  # tj


def a_run(seconds: float) -> DecodeRun:
    """As if it had begun now and just ended."""
    start = time.monotonic_ns()
    time.sleep(seconds)
    gap = int(seconds * 1e9 / 5)
    return replace(RUN, start_ns=start, token_ns=[gap * (index + 1) for index in range(5)], pause_ns=[0] * 5)


def test_a_run_has_its_energy_and_the_state_around_it(tmp_path: Path) -> None:
    with Watch(root=orin_nx(tmp_path)) as watch:
        before = watch.before()
        run = a_run(0.5)
        seen = watch.after(before, run)
    assert seen.invalid is None
    assert seen.energy is not None
    assert seen.energy["power_w_mean"] == pytest.approx(VDD_IN_WATTS)
    assert seen.energy["power_w_idle"] == pytest.approx(VDD_IN_WATTS)
    assert seen.energy["joules_per_token"] == pytest.approx(VDD_IN_WATTS * 0.1)
    assert seen.energy["joules_per_token_above_idle"] == pytest.approx(0, abs=1e-6)
    assert seen.power is not None
    assert seen.power["tokens_ms"] == [100, 200, 300, 400, 500]
    assert all(0 <= moment <= 500 for moment in seen.power["t_ms"])
    assert seen.state["temperature_c"] == [52.375, 52.375]
    assert seen.state["before"]["power_mode"] == "MAXN_SUPER"


def test_a_mode_that_changes_within_a_run_or_between_runs_makes_it_invalid(tmp_path: Path) -> None:
    board = orin_nx(tmp_path)
    with Watch("none", root=board) as watch:
        first = watch.before()
        assert watch.after(first, RUN).invalid is None
        second = watch.before()
        write(board / "var/lib/nvpmodel/status", "pmode:0002")
        within = watch.after(second, RUN).invalid
        between = watch.after(watch.before(), RUN).invalid
    for reason in within, between:
        assert reason is not None
        assert "power mode from MAXN_SUPER to 15W" in reason
    # A benchmark that goes on has the state from before its interruption.
    with Watch("none", reference=(first.state, first.temperature_c), root=board) as watch:
        assert watch.after(watch.before(), RUN).invalid is not None


def test_a_run_waits_until_the_chip_is_cool_again(tmp_path: Path) -> None:
    board = orin_nx(tmp_path)
    with Watch("none", 30, root=board) as watch:
        watch.before()
        write(board / ZONE, 80_000)
        calls = []

        def waiting() -> None:
            calls.append(None)
            if len(calls) == 2:
                write(board / ZONE, 54_000)

        before = watch.before(waiting)
    assert len(calls) == 2
    assert 0.9 < before.waited_s < 5
    assert before.note is None
    assert before.temperature_c == 54


def test_waiting_for_the_temperature_has_a_limit(tmp_path: Path) -> None:
    board = orin_nx(tmp_path)
    with Watch("none", 0.6, root=board) as watch:
        watch.before()
        write(board / ZONE, 80_000)
        before = watch.before()
    assert 0.6 <= before.waited_s < 2
    assert before.note is not None
    assert "degrees warmer" in before.note
    with Watch("none", 0, reference=({}, 40.0), root=board) as watch:
        before = watch.before()
    assert before.waited_s < 0.2
    assert before.note is None


def test_a_sensor_that_fails_midway_leaves_the_run_without_energy_and_says_why(tmp_path: Path) -> None:
    board = orin_nx(tmp_path)
    with Watch(root=board) as watch:
        before = watch.before()
        for path in board.rglob("curr*_input"):
            path.write_text("garbage\n")
        time.sleep(0.1)
        seen = watch.after(before, a_run(0.5))
    assert seen.energy is not None
    assert seen.energy["joules_per_token"] is None
    assert seen.energy["power_status"] == "not measured"
    assert "INA3221" in seen.energy["power_reason"] or "curr" in seen.energy["power_reason"]
    assert seen.power is None


def test_a_failed_run_has_no_energy(tmp_path: Path) -> None:
    with Watch("none", root=orin_nx(tmp_path)) as watch:
        seen = watch.after(watch.before(), None)
    assert (seen.energy, seen.power, seen.invalid) == (None, None, None)


def test_without_a_sensor_energy_is_none_and_the_reason_is_told(tmp_path: Path) -> None:
    with Watch(root=tmp_path) as watch:
        begin = time.monotonic()
        seen = watch.after(watch.before(), replace(RUN, start_ns=time.monotonic_ns() - 1000 * MS))
    # There is nothing to measure, so nothing waits for it.
    assert time.monotonic() - begin < 0.9
    assert seen.energy is not None
    assert seen.energy["joules_per_token"] is None
    assert "no power sensor works here" in seen.energy["power_reason"]
    with pytest.raises(RemoeError, match="powercap does not work here"):
        Watch("powercap", root=tmp_path)
