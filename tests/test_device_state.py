"""State and identity of the machine, on faked trees of an Orin NX, of a PC, and of a machine that tells nothing."""

import os
from pathlib import Path

import pytest
from fake_jetson import MODES, cpufreq, orin_nx, write

from remoe_edge.device.identity import identity, is_jetson
from remoe_edge.device.state import configured_modes, same_mode, snapshot, temperature, throttled


@pytest.mark.parametrize(
    ("jetpack", "l4t", "named", "kernel"),
    [(5, "35.4.1", "5", "5.10.120-tegra"), (6, "36.4.7", "6.2.1", "5.15.148-tegra"), (7, "39.2.1", "7.2.1", "6.8.12")],
)
def test_an_orin_nx_is_recognised(tmp_path: Path, jetpack: int, l4t: str, named: str, kernel: str) -> None:
    device = identity(orin_nx(tmp_path, jetpack))
    assert device.device == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert (device.jetson, device.l4t, device.jetpack, device.cpu) == (True, l4t, named, "Cortex-A78AE")
    assert device.kernel.startswith(kernel)
    assert device.memory_bytes == 16031744 * 1024


def test_a_container_on_a_jetson_is_one_without_its_release(tmp_path: Path) -> None:
    (orin_nx(tmp_path) / "etc/nv_tegra_release").unlink()
    device = identity(tmp_path)
    assert (device.jetson, device.l4t, device.jetpack) == (True, None, None)


def test_a_release_from_the_future_is_named_by_its_first_number(tmp_path: Path) -> None:
    write(tmp_path / "etc/nv_tegra_release", "# R39 (release), REVISION: 9.7, ...")
    assert (identity(tmp_path).l4t, identity(tmp_path).jetpack) == ("39.9.7", "7")


@pytest.mark.parametrize("jetpack", [5, 6, 7])
def test_snapshot_of_an_orin_nx(tmp_path: Path, jetpack: int) -> None:
    state = snapshot(orin_nx(tmp_path, jetpack))
    assert (state["power_mode"], state["power_mode_id"], state["jetson_clocks"]) == ("MAXN_SUPER", 0, False)
    assert (state["cpu_online"], state["cpu_governor"], state["cpu_mhz"]) == ("0-7", "schedutil", [1984] * 8)
    assert (state["cpu_min_mhz"], state["cpu_max_mhz"]) == (730, 1984)
    assert (state["gpu_mhz"], state["gpu_min_mhz"], state["gpu_max_mhz"]) == (306, 306, 1173)
    assert (state["emc_mhz"], state["emc_max_mhz"]) == (3199 if jetpack == 7 else 2133, 3199)
    # The zone of a part that is off reads -256 degrees.
    assert state["temperatures_c"] == {"cpu": 52.375, "gpu": 50.0, "soc0": 48.25, "tj": 52.375}
    assert (state["throttle_counts"], state["cooling"]) == ({"oc1": 0, "oc2": 0, "oc3": 0}, {"pwm-fan": 1})
    assert (state["fan_rpm"], state["fan_pwm"]) == (2140, 128)


def test_a_machine_that_tells_nothing_has_the_same_keys(tmp_path: Path) -> None:
    nothing = snapshot(tmp_path)
    assert nothing.keys() == snapshot(orin_nx(tmp_path / "orin")).keys()
    assert {key for key, value in nothing.items() if value} == set()
    assert temperature(tmp_path) is None
    assert not is_jetson(tmp_path)
    # And so has the one this test runs on.
    assert snapshot().keys() == nothing.keys()


def nvpmodel(root: Path, script: str) -> None:
    write(root / "usr/sbin/nvpmodel", f"#!/bin/sh\n{script}")
    os.chmod(root / "usr/sbin/nvpmodel", 0o755)


def test_nvpmodel_is_asked_where_it_is_installed(tmp_path: Path) -> None:
    nvpmodel(orin_nx(tmp_path), 'test "$1" = -q && printf "NV Power Mode: 25W\\n3\\n"')
    state = snapshot(tmp_path)
    assert (state["power_mode"], state["power_mode_id"]) == ("25W", 3)


@pytest.mark.parametrize("script", ["exit 1", "echo permission denied >&2; exit 255", "printf '\\377'"])
def test_without_an_answer_of_nvpmodel_its_file_is_read(tmp_path: Path, script: str) -> None:
    nvpmodel(orin_nx(tmp_path, mode=4), script)
    assert (snapshot(tmp_path)["power_mode"], snapshot(tmp_path)["power_mode_id"]) == ("40W", 4)
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert (snapshot(tmp_path)["power_mode"], snapshot(tmp_path)["power_mode_id"]) == (None, 4)


def test_modes_of_the_configuration(tmp_path: Path) -> None:
    assert configured_modes(orin_nx(tmp_path)) == MODES


def test_fixed_clocks_are_seen(tmp_path: Path) -> None:
    orin_nx(tmp_path)
    for core in range(8):
        cpufreq(tmp_path, core, low=1984000, high=1984000, now=1984000)
    assert snapshot(tmp_path)["jetson_clocks"] is False
    write(tmp_path / "sys/class/devfreq/17000000.gpu/min_freq", 1173000000)
    assert snapshot(tmp_path)["jetson_clocks"] is True


def test_the_hottest_junction_is_the_temperature(tmp_path: Path) -> None:
    orin_nx(tmp_path)
    write(tmp_path / "sys/class/thermal/thermal_zone4/temp", 71500)
    write(tmp_path / "sys/class/thermal/thermal_zone0/temp", 75000)
    assert temperature(tmp_path) == 71.5


def pc(root: Path) -> Path:
    cpufreq(root, 0, low=400000, high=5000000, now=3100000)
    write(root / "sys/devices/system/cpu/online", "0-15")
    write(root / "sys/devices/system/cpu/intel_pstate/no_turbo", 0)
    write(root / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 3)
    write(root / "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", 4)
    write(root / "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", 9)
    write(root / "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count", 9)
    write(root / "sys/class/thermal/thermal_zone0/type", "acpitz")
    write(root / "sys/class/thermal/thermal_zone0/temp", 27800)
    for number, (name, values) in enumerate({"coretemp": (61000, 64000), "nvme": (88850,)}.items()):
        write(root / f"sys/class/hwmon/hwmon{number}/name", name)
        for channel, value in enumerate(values, start=1):
            write(root / f"sys/class/hwmon/hwmon{number}/temp{channel}_input", value)
    write(root / "sys/class/power_supply/AC/type", "Mains")
    write(root / "sys/class/power_supply/AC/online", 1)
    write(root / "sys/firmware/acpi/platform_profile", "balanced")
    return root


def test_snapshot_of_a_pc(tmp_path: Path) -> None:
    state = snapshot(pc(tmp_path))
    assert (state["power_mode"], state["jetson_clocks"], state["on_battery"]) == (None, None, False)
    assert (state["cpu_boost"], state["cpu_mhz"], state["platform_profile"]) == (True, [3100], "balanced")
    assert state["temperatures_c"] == {"acpitz": 27.8, "coretemp": 64.0, "nvme": 88.85}
    assert state["throttle_counts"] == {"cpu_core": 7, "cpu_package": 9}
    # A hot drive is no hot chip.
    assert temperature(tmp_path) == 64.0


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("var/lib/nvpmodel/status", "pmode:0003", "power mode from MAXN_SUPER to 25W"),
        ("sys/devices/system/cpu/online", "0-3", "CPU cores online from 0-7 to 0-3"),
        ("sys/class/devfreq/17000000.gpu/max_freq", 612000000, "highest GPU clock from 1173 to 612"),
        ("sys/devices/system/cpu/cpu3/cpufreq/scaling_governor", "performance", "CPU governor from schedutil to perf"),
    ],
)
def test_a_mode_that_changed_midway_is_told(tmp_path: Path, path: str, content: object, said: str) -> None:
    before = snapshot(orin_nx(tmp_path))
    write(tmp_path / path, content)
    change = same_mode(before, snapshot(tmp_path))
    assert change is not None
    assert said in change


def test_what_moves_by_itself_is_no_other_mode(tmp_path: Path) -> None:
    before = snapshot(orin_nx(tmp_path))
    cpufreq(tmp_path, 0, low=729600, high=1984000, now=729600)
    write(tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq", 1173000000)
    write(tmp_path / "sys/class/thermal/thermal_zone0/temp", 80000)
    write(tmp_path / "sys/class/hwmon/hwmon2/rpm", 4000)
    after = snapshot(tmp_path)
    assert before != after
    assert same_mode(before, after) is None


def test_throttling_during_a_run_is_told(tmp_path: Path) -> None:
    before = snapshot(orin_nx(tmp_path))
    assert throttled(before, before) is None
    write(tmp_path / "sys/class/hwmon/hwmon4/oc3_event_cnt", 12)
    assert throttled(before, snapshot(tmp_path)) == "throttled during the run: oc3 12 times"
    assert throttled({}, {}) is None
