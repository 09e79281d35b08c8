"""A folder with the files by which an Orin NX 16 GB tells about itself, laid out as JetPack 5, 6 and 7 do.

Layouts and values as published by owners of such boards (hwmon names and labels, nvpmodel's modes, devfreq names,
soctherm counters); none of it was read from a board by us.
"""

from pathlib import Path

# Millivolts and milliamperes by rail.
RAILS = {"VDD_IN": (4984, 1596), "VDD_CPU_GPU_CV": (4984, 474), "VDD_SOC": (4984, 502)}
VDD_IN_WATTS = 4984 * 1596 / 1e6

RELEASES = {
    5: "# R35 (release), REVISION: 4.1, ...",
    6: "# R36 (release), REVISION: 4.7, ...",
    7: "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Aug  7 05:54:22 AM UTC 2026",
}
KERNELS = {5: "5.10.120-tegra", 6: "5.15.148-tegra", 7: "6.8.12-1021-tegra"}
MODES = {0: "MAXN_SUPER", 1: "10W", 2: "15W", 3: "25W", 4: "40W"}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def orin_nx(root: Path, jetpack: int = 6, mode: int = 0) -> Path:
    """Lay the whole tree out below `root`; returns `root`."""
    ina3221(root, jetpack)
    write(root / "etc/nv_tegra_release", RELEASES[jetpack])
    write(root / "proc/sys/kernel/osrelease", KERNELS[jetpack])
    device_tree = root / "proc/device-tree"
    device_tree.mkdir(parents=True)
    (device_tree / "model").write_bytes(b"NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    (device_tree / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0")
    write(
        root / "proc/meminfo",
        "MemTotal:       16031744 kB\nMemAvailable:   13500000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
    )
    write(root / "proc/cpuinfo", "processor\t: 0\nCPU part\t: 0xd42")
    write(root / "proc/loadavg", "0.10 0.10 0.10 1/300 4000")
    write(
        root / "etc/nvpmodel.conf",
        "\n".join(f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1" for number, name in MODES.items()),
    )
    write(root / "var/lib/nvpmodel/status", f"pmode:{mode:04}")
    cpus = root / "sys/devices/system/cpu"
    write(cpus / "online", "0-7")
    write(cpus / "present", "0-7")
    for core in range(8):
        cpufreq(root, core, low=729600, high=1984000, now=1984000)
    gpu = root / "sys/class/devfreq/17000000.gpu"
    for name, hertz in ("cur_freq", 306000000), ("min_freq", 306000000), ("max_freq", 1173000000):
        write(gpu / name, hertz)
    if jetpack == 7:
        write(root / "sys/class/devfreq/bwmgr/cur_freq", 3199000000)
        write(root / "sys/class/devfreq/bwmgr/max_freq", 3199000000)
    else:
        write(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate", 2133000000)
        write(root / "sys/kernel/debug/bpmp/debug/clk/emc/max_rate", 3199000000)
    zones = {"cpu": 52375, "gpu": 50000, "soc0": 48250, "cv0": -256000, "tj": 52375}
    for number, (name, millidegrees) in enumerate(zones.items()):
        write(root / f"sys/class/thermal/thermal_zone{number}/type", f"{name}-thermal")
        write(root / f"sys/class/thermal/thermal_zone{number}/temp", millidegrees)
    for number, (name, level) in enumerate({"pwm-fan": 1, "cpu-throttle-alert": 0, "gpu-throttle-alert": 0}.items()):
        write(root / f"sys/class/thermal/cooling_device{number}/type", name)
        write(root / f"sys/class/thermal/cooling_device{number}/cur_state", level)
    chips = root / "sys/class/hwmon"
    write(chips / "hwmon0/name", "pwmfan")
    write(chips / "hwmon0/pwm1", 128)
    write(chips / "hwmon2/name", "pwm_tach")
    write(chips / "hwmon2/rpm", 2140)
    write(chips / "hwmon4/name", "soctherm_oc")
    for number, count in (1, 0), (2, 0), (3, 0):
        write(chips / f"hwmon4/oc{number}_event_cnt", count)
    return root


def cpufreq(root: Path, core: int, *, low: int, high: int, now: int) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
    write(folder / "scaling_min_freq", low)
    write(folder / "scaling_max_freq", high)
    write(folder / "scaling_cur_freq", now)
    write(folder / "scaling_governor", "schedutil")


def ina3221(root: Path, jetpack: int) -> Path:
    """The sensor's folder only; returns it. Releases differ in names, numbers and in the order of rails."""
    if jetpack == 5:
        folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4"
        order = ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    elif jetpack == 6:
        folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
        order = ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    else:
        folder = root / "sys/bus/i2c/drivers/ina3221/2-0040/hwmon/hwmon3"
        order = ["VDD_SOC", "VDD_CPU_GPU_CV", "VDD_IN"]
    write(folder / "name", "ina3221")
    for number, label in enumerate(order, start=1):
        millivolts, milliamperes = RAILS[label]
        write(folder / f"in{number}_label", label)
        write(folder / f"in{number}_enable", 1)
        write(folder / f"in{number}_input", millivolts)
        write(folder / f"curr{number}_input", milliamperes)
        write(folder / f"curr{number}_crit", 7784)
        write(folder / f"in{number + 3}_input", 8000)
    write(folder / "in7_label", "sum of shunt voltages")
    write(folder / "in7_input", 12860)
    write(folder / "curr4_input", 2572)
    return folder


def ina3221_iio(root: Path) -> Path:
    """The sensor under NVIDIA's older driver (ina3221x, IIO)."""
    folder = root / "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0"
    for number, (label, (millivolts, milliamperes)) in enumerate(RAILS.items()):
        write(folder / f"rail_name_{number}", label)
        write(folder / f"in_voltage{number}_input", millivolts)
        write(folder / f"in_current{number}_input", milliamperes)
        write(folder / f"in_power{number}_input", millivolts * milliamperes // 1000)
    return folder
