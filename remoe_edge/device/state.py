"""State of the machine that results depend on: power mode, clocks, temperatures, throttling, fan.

Works on a Jetson and on any Linux; ``root`` is the folder that holds ``sys``, ``proc``, ``var`` and ``etc``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from remoe_edge.device.identity import is_jetson
from remoe_edge.device.sysfs import number, text

Snapshot = dict[str, Any]
"""Plain values for a result row; None where the machine does not tell."""

_NVPMODEL = ("usr/sbin/nvpmodel", "usr/bin/nvpmodel")
_QUERY_S = 10
_MODE = re.compile(r"NV Power Mode:\s*(\S+)(?:\s+(?:MODE ID:\s*)?(\d+))?")
_CONFIGURED_MODE = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", re.MULTILINE)
_GPU = re.compile(r"\.(gpu|ga10b|gv11b)$|^gpu-gpc-")
_EMC_CLOCK = "sys/kernel/debug/bpmp/debug/clk/emc"
_CHIP_SENSORS = {"coretemp", "k10temp", "zenpower", "cpu_thermal"}
# Zones of parts that are switched off read far below any real temperature.
_SANE_C = (-40.0, 150.0)

# What makes up a mode: none of these may change during a run. Cores and limits also tell modes apart where the name of
# the mode is not known.
_MODE_KEYS = {
    "power_mode": "power mode",
    "power_mode_id": "power mode id",
    "jetson_clocks": "jetson_clocks",
    "on_battery": "running on battery",
    "platform_profile": "platform profile",
    "cpu_online": "CPU cores online",
    "cpu_governor": "CPU governor",
    "cpu_boost": "CPU boost",
    "cpu_max_mhz": "highest CPU clock",
    "gpu_max_mhz": "highest GPU clock",
    "emc_max_mhz": "highest memory clock",
}


def snapshot(root: Path = Path("/")) -> Snapshot:
    """The state now, for a result row; keys are the same on every machine, None is "not known".

    Keys: ``power_mode`` and ``power_mode_id`` (nvpmodel); ``jetson_clocks`` (clocks fixed at their limits);
    ``on_battery``; ``platform_profile``; ``cpu_online`` ("0-7"); ``cpu_governor``; ``cpu_boost``; ``cpu_mhz``, a list
    over cores, ``cpu_min_mhz`` and ``cpu_max_mhz`` (limits); ``gpu_mhz``, ``gpu_min_mhz``, ``gpu_max_mhz``; ``emc_mhz``
    and ``emc_max_mhz`` (the memory's clock, which only root sees on most releases); ``temperatures_c`` by zone;
    ``throttle_counts``, events since boot by counter; ``cooling``, levels above zero by cooling device; ``fan_rpm``,
    ``fan_pwm`` (0 to 255). Takes milliseconds, plus those of nvpmodel on a Jetson.
    """
    mode, mode_id = _power_mode(root)
    cpu, gpu = _cpu(root), _gpu(root)
    return {
        "power_mode": mode,
        "power_mode_id": mode_id,
        "jetson_clocks": _fixed(root, gpu) if is_jetson(root) else None,
        "on_battery": _on_battery(root),
        "platform_profile": text(root / "sys/firmware/acpi/platform_profile"),
        **cpu,
        **gpu,
        **_emc(root),
        "temperatures_c": temperatures(root),
        "throttle_counts": _throttle_counts(root),
        "cooling": _cooling(root),
        **_fan(root),
    }


def same_mode(before: Snapshot, after: Snapshot) -> str | None:
    """None if both were taken in the same power mode; else a sentence that says what changed: the run is invalid."""
    changes = [
        f"{name} from {before.get(key)} to {after.get(key)}"
        for key, name in _MODE_KEYS.items()
        if before.get(key) != after.get(key)
    ]
    if not changes:
        return None
    return (
        f"the machine's mode changed during the run: {', '.join(changes)} (a clock limit also falls with overheating)"
    )


def throttled(before: Snapshot, after: Snapshot) -> str | None:
    """None if the hardware counted no throttling between two snapshots (or counts none); else what it counted."""
    was = before.get("throttle_counts") or {}
    risen = {
        name: count - was[name]
        for name, count in (after.get("throttle_counts") or {}).items()
        if count > was.get(name, count)
    }
    return (
        f"throttled during the run: {', '.join(f'{name} {times} times' for name, times in risen.items())}"
        if risen
        else None
    )


def temperature(root: Path = Path("/")) -> float | None:
    """Degrees Celsius of the hottest part of the chip, for a cool-down; None if there is no sensor.

    On a Jetson the zone "tj", the hottest junction; elsewhere the highest of all zones but drives.
    """
    zones = temperatures(root)
    if "tj" in zones:
        return zones["tj"]
    return max((value for name, value in zones.items() if not name.startswith("nvme")), default=None)


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius by thermal zone, without "-thermal"; CPU and NVMe sensors that are no zone are added."""
    found: dict[str, float] = {}

    def add(name: str, path: Path) -> None:
        value = number(path)
        if value is not None and _SANE_C[0] < value / 1000 < _SANE_C[1]:
            found[name] = max(value / 1000, found.get(name, -300))

    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name = (text(zone / "type") or zone.name).lower()
        add(re.sub(r"[-_]therm(al)?$", "", name), zone / "temp")
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = text(chip / "name") or ""
        if name in _CHIP_SENSORS or name == "nvme":
            for path in chip.glob("temp*_input"):
                add(name, path)
    return found


def configured_modes(root: Path = Path("/")) -> dict[int, str]:
    """nvpmodel's modes by id, from its configuration; empty elsewhere."""
    return {int(mode): name for mode, name in _CONFIGURED_MODE.findall(text(root / "etc/nvpmodel.conf") or "")}


def _power_mode(root: Path) -> tuple[str | None, int | None]:
    """nvpmodel's answer; without the program, as in containers, the file in which it keeps the mode."""
    for program in _NVPMODEL:
        if (root / program).exists():
            with suppress(OSError, subprocess.SubprocessError):
                command = [str(root / program), "-q"]
                answer = subprocess.run(command, capture_output=True, timeout=_QUERY_S, check=False).stdout
                if match := _MODE.search(answer.decode(errors="replace")):
                    return match[1], int(match[2]) if match[2] else None
    match = re.search(r"pmode:(\d+)", text(root / "var/lib/nvpmodel/status") or "")
    if match is None:
        return None, None
    return configured_modes(root).get(int(match[1])), int(match[1])


def _cpu(root: Path) -> Snapshot:
    folder = root / "sys/devices/system/cpu"
    policies = sorted(folder.glob("cpu[0-9]*/cpufreq"), key=lambda path: int(path.parent.name[3:]))
    now = [_mhz(number(path / "scaling_cur_freq"), 1000) for path in policies]
    governors = {governor for path in policies if (governor := text(path / "scaling_governor"))}
    no_turbo = number(folder / "intel_pstate/no_turbo")
    boost = number(folder / "cpufreq/boost")
    return {
        "cpu_online": text(folder / "online"),
        "cpu_governor": ", ".join(sorted(governors)) or None,
        "cpu_boost": not no_turbo if no_turbo is not None else None if boost is None else bool(boost),
        "cpu_mhz": [value for value in now if value is not None] or None,
        "cpu_min_mhz": _mhz(_largest(number(path / "scaling_min_freq") for path in policies), 1000),
        "cpu_max_mhz": _mhz(_largest(number(path / "scaling_max_freq") for path in policies), 1000),
    }


def _gpu(root: Path) -> Snapshot:
    folders = [path for path in sorted((root / "sys/class/devfreq").glob("*")) if _GPU.search(path.name)]
    files = {"gpu_mhz": "cur_freq", "gpu_min_mhz": "min_freq", "gpu_max_mhz": "max_freq"}
    return {key: _mhz(number(folders[0] / name), 1_000_000) if folders else None for key, name in files.items()}


def _emc(root: Path) -> Snapshot:
    clock, manager = root / _EMC_CLOCK, root / "sys/class/devfreq/bwmgr"
    return {
        "emc_mhz": _mhz(number(clock / "rate") or number(manager / "cur_freq"), 1_000_000),
        "emc_max_mhz": _mhz(number(clock / "max_rate") or number(manager / "max_freq"), 1_000_000),
    }


def _fixed(root: Path, gpu: Snapshot) -> bool | None:
    """Whether clocks cannot go below their limit, which is what jetson_clocks does; asking it would need root."""
    limits = [
        (number(path / "scaling_min_freq"), number(path / "scaling_max_freq"))
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    ]
    limits.append((gpu["gpu_min_mhz"], gpu["gpu_max_mhz"]))
    known = [limit for limit in limits if None not in limit]
    return all(low == high for low, high in known) if known else None


def _on_battery(root: Path) -> bool | None:
    supplies = list((root / "sys/class/power_supply").glob("*"))
    mains = [number(path / "online") for path in supplies if text(path / "type") == "Mains"]
    return not any(mains) if mains else None


def _throttle_counts(root: Path) -> dict[str, int]:
    """Events since boot. Jetson: oc1 is under-voltage, oc2 mean over-current, oc3 momentary over-current."""
    counts = {
        path.name.removesuffix("_event_cnt"): value
        for path in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
        if (value := number(path)) is not None
    }
    for kind in "core", "package":
        paths = (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/thermal_throttle/{kind}_throttle_count")
        values = [value for path in paths if (value := number(path)) is not None]
        if values:
            counts[f"cpu_{kind}"] = sum(values) if kind == "core" else max(values)
    return counts


def _cooling(root: Path) -> dict[str, int]:
    levels: dict[str, int] = {}
    for path in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        level, name = number(path / "cur_state"), text(path / "type") or path.name
        if level is not None and level > 0:
            levels[name] = max(level, levels.get(name, 0))
    return levels


def _fan(root: Path) -> Snapshot:
    chips = root / "sys/class/hwmon"
    speeds = [number(path) for pattern in ("hwmon*/rpm", "hwmon*/fan*_input") for path in sorted(chips.glob(pattern))]
    return {
        "fan_rpm": _largest(speeds),
        "fan_pwm": _largest(number(path) for path in sorted(chips.glob("hwmon*/pwm1"))),
    }


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _mhz(value: int | None, per_mhz: int) -> int | None:
    return None if value is None else round(value / per_mhz)
