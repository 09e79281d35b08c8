"""Power sources: each on the files, lines or modules that its machines have."""

import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_jetson import RAILS, VDD_IN_WATTS, ina3221, ina3221_iio, orin_nx, write

from remoe_edge.errors import RemoeError
from remoe_edge.power.find import SOURCES, find_source
from remoe_edge.power.ina3221 import Ina3221Source
from remoe_edge.power.jtop import JtopSource
from remoe_edge.power.nvml import NvmlSource
from remoe_edge.power.powercap import PowercapSource
from remoe_edge.power.sampler import Sampler
from remoe_edge.power.source import NoSource, SensorError
from remoe_edge.power.tegrastats import TegrastatsSource, parse_line

# INA3221


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda root: ina3221(root, 5),
        lambda root: ina3221(root, 6),
        lambda root: ina3221(root, 7),
        ina3221_iio,
    ],
    ids=["JetPack 5", "JetPack 6", "JetPack 7", "ina3221x, IIO"],
)
def test_the_input_rail_is_found_by_its_label(tmp_path: Path, lay_out: Callable[[Path], Path]) -> None:
    lay_out(tmp_path)
    source = Ina3221Source(tmp_path)
    assert (source.name, source.sensor, source.period_s, source.counter) == ("ina3221", "VDD_IN", 0.02, False)
    assert source.read() == pytest.approx(VDD_IN_WATTS)


def test_a_container_that_shows_only_class_hwmon_is_enough(tmp_path: Path) -> None:
    folder = ina3221(tmp_path / "host", 6)
    (tmp_path / "sys/class/hwmon").mkdir(parents=True)
    (tmp_path / "sys/class/hwmon/hwmon1").symlink_to(folder)
    assert Ina3221Source(tmp_path).read() == pytest.approx(VDD_IN_WATTS)


def test_a_reading_follows_the_sensor(tmp_path: Path) -> None:
    folder = ina3221(tmp_path, 6)
    source = Ina3221Source(tmp_path)
    write(folder / "in1_input", 5016)
    write(folder / "curr1_input", 6050)
    assert source.read() == pytest.approx(30.3468)


def test_agx_orin_has_the_sum_of_three_rails(tmp_path: Path) -> None:
    rails = [("1-0040", 1, "VDD_GPU_SOC", 2000), ("1-0040", 2, "VDD_CPU_CV", 400), ("1-0040", 3, "VIN_SYS_5V0", 800)]
    for address, number, label, current in [*rails, ("1-0041", 2, "VDDQ_VDD2_1V8AO", 300), ("1-0041", 1, "NC", 0)]:
        folder = tmp_path / f"sys/bus/i2c/drivers/ina3221/{address}/hwmon/hwmon{address[-1]}"
        write(folder / f"in{number}_label", label)
        write(folder / f"in{number}_input", 5000)
        write(folder / f"curr{number}_input", current)
    source = Ina3221Source(tmp_path)
    assert source.sensor == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert source.read() == pytest.approx(16.0)


def test_without_the_input_rail_nothing_is_passed_off_as_it(tmp_path: Path) -> None:
    with pytest.raises(SensorError, match="no rails of an INA3221"):
        Ina3221Source(tmp_path)
    write(ina3221(tmp_path, 6) / "in1_label", "NC")
    with pytest.raises(SensorError, match=r"only the rails NC, VDD_CPU_GPU_CV, VDD_SOC .* not the module's input"):
        Ina3221Source(tmp_path)


@pytest.mark.parametrize("content", ["", "abc", "-12", "1.5e3", "\xff\xfe"])
def test_garbage_in_a_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    folder = ina3221(tmp_path, 6)
    source = Ina3221Source(tmp_path)
    (folder / "curr1_input").write_bytes(content.encode("latin-1"))
    with pytest.raises(SensorError, match="curr1_input"):
        source.read()


def test_a_driver_that_is_loaded_again_is_found_again(tmp_path: Path) -> None:
    folder = ina3221(tmp_path, 6)
    source = Ina3221Source(tmp_path)
    # An open file of a driver that is gone gives no more values.
    write(folder / "in1_input", "")
    folder.rename(folder.parent / "away")
    with pytest.raises(SensorError, match="in1_input: holds '', not a number"):
        source.read()
    with pytest.raises(SensorError, match="VDD_IN: the sensor is not there any more"):
        source.read()
    write(folder.parent / "away/in1_input", RAILS["VDD_IN"][0])
    (folder.parent / "away").rename(folder.parent / "hwmon9")
    assert source.read() == pytest.approx(VDD_IN_WATTS)


# tegrastats. The lines were written by boards of others and taken from public places: those of JetPack 5 and 6 (Orin
# NX 16 GB) from bug reports and test data of other projects, whose "..." are kept where they had shortened a line; that
# of JetPack 7.2 (AGX Orin, as root) from pull request 894 of jetson_stats; the one that shows rails beside the new form
# of GR3D_FREQ (Orin NX, root) from another project's test data, which does not name the release.
JETPACK_5 = (
    "RAM 6334/15388MB (lfb 1770x4MB) ... CPU [6%@729,...,off,off,off,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@611 VIC_FREQ 729 APE 174 CV0@45.812C CPU@47.937C ... VDD_IN 5299mW/5299mW "
    "VDD_CPU_GPU_CV 773mW/773mW VDD_SOC 1424mW/1424mW"
)
JETPACK_6 = (
    "07-28-2026 20:28:42 RAM 3941/15656MB (lfb 6x4MB) SWAP 0/24212MB (cached 0MB) CPU [1%@1984,7%@1984,3%@1984,"
    "2%@1984,0%@1984,5%@1984,1%@1984,2%@1984] GR3D_FREQ 0% cv0@47.156C cpu@52.375C soc2@45.531C soc0@48.25C "
    "cv1@47.968C gpu@50C tj@52.375C soc1@46.156C cv2@44.406C VDD_IN 7956mW/7956mW VDD_CPU_GPU_CV 2363mW/2363mW "
    "VDD_SOC 2506mW/2506mW"
)
JETPACK_6_BUSY = (
    "08-21-2026 18:23:23 RAM 6567/15656MB (lfb 54x4MB) SWAP 3109/7828MB (cached 5MB) CPU [31%@1984,54%@1984,50%@1984,"
    "64%@1984,54%@1984,55%@1984,55%@1984,100%@1984] GR3D_FREQ 7% cv0@57.281C cpu@58.937C ... tj@58.937C ... "
    "VDD_IN 12673mW/8213mW VDD_CPU_GPU_CV 7050mW/3122mW VDD_SOC 2121mW/1931mW"
)
JETPACK_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,...] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 0%@[1300,1300] NVENC0 off NVDEC0 off ... APE 174 cpu@52.968C/52.968C ..."
)
AS_ROOT = (
    "10-04-2026 10:02:18 RAM 5997/15656MB (lfb 50x1MB) CPU [0%@1984] EMC_FREQ 2%@3199 GR3D_FREQ 27%@[1172] "
    "gpu@59.625C cpu@62.593C tj@62.593C"
)


def test_a_line_of_jetpack_5() -> None:
    line = parse_line(JETPACK_5)
    assert line.rails_w == {"VDD_IN": 5.299, "VDD_CPU_GPU_CV": 0.773, "VDD_SOC": 1.424}
    assert line.temperatures_c == {"cv0": 45.812, "cpu": 47.937}
    assert line.cores == [(6, 729), None, None, None, None, None]
    assert (line.gpu_percent, line.gpu_mhz, line.memory_used_mb, line.memory_total_mb) == (0, 611, 6334, 15388)


def test_a_line_of_jetpack_6() -> None:
    line = parse_line(JETPACK_6)
    assert line.rails_w == {"VDD_IN": 7.956, "VDD_CPU_GPU_CV": 2.363, "VDD_SOC": 2.506}
    assert (len(line.temperatures_c), line.temperatures_c["gpu"], line.temperatures_c["tj"]) == (9, 50.0, 52.375)
    assert (len(line.cores), line.cores[1]) == (8, (7, 1984))
    assert (line.gpu_percent, line.gpu_mhz, line.memory_used_mb, line.memory_total_mb) == (0, None, 3941, 15656)


def test_the_value_of_this_moment_is_read_and_not_the_mean_since_the_start() -> None:
    assert parse_line(JETPACK_6_BUSY).rails_w == {"VDD_IN": 12.673, "VDD_CPU_GPU_CV": 7.05, "VDD_SOC": 2.121}


def test_a_line_of_jetpack_7() -> None:
    line = parse_line(JETPACK_7)
    assert (line.rails_w, line.temperatures_c) == ({}, {"cpu": 52.968})
    assert (line.gpu_percent, line.gpu_mhz, line.memory_used_mb, line.memory_total_mb) == (0, 1300, 20642, 62817)
    assert line.cores[:2] == [(23, 2201), (10, 2201)]
    as_root = parse_line(AS_ROOT)
    assert (as_root.gpu_percent, as_root.gpu_mhz, as_root.temperatures_c["tj"]) == (27, 1172, 62.593)


@pytest.mark.parametrize("line", ["", "\0\xff", "VDD_IN mW/mW", "RAM x/yMB CPU [", "VDD_IN -5mW/3mW @C x@1.2.3C"])
def test_garbage_is_an_empty_line(line: str) -> None:
    parsed = parse_line(line)
    assert (parsed.rails_w, parsed.temperatures_c, parsed.gpu_percent, parsed.memory_used_mb) == ({}, {}, None, None)


def tegrastats(folder: Path, code: str) -> str:
    """A program that takes tegrastats' options and runs `code`, in which `interval` is in seconds."""
    path = folder / "tegrastats"
    path.write_text(
        f"#!{sys.executable}\nimport sys, time\nassert sys.argv[1] == '--interval'\n"
        f"interval = int(sys.argv[2]) / 1000\nline = {JETPACK_6!r}\n{code}"
    )
    path.chmod(0o755)
    return str(path)


def test_a_running_tegrastats_is_read_line_by_line_and_ended(tmp_path: Path) -> None:
    endless = "while True:\n    print(line, flush=True)\n    time.sleep(interval)\n"
    source = TegrastatsSource(tegrastats(tmp_path, endless), period_s=0.05)
    process = source._process
    with Sampler(source) as sampler:
        time.sleep(0.6)
    recording = sampler.recording()
    assert (recording.source, recording.sensor, recording.status) == ("tegrastats", "VDD_IN", "measured")
    assert set(recording.watts) == {7.956}
    assert 5 <= len(recording.t_ns) <= 13
    assert process.returncode is not None


def test_lines_that_nobody_read_in_time_are_dropped(tmp_path: Path) -> None:
    rising = (
        "for n in range(1000):\n    print(line.replace('VDD_IN 7956', f'VDD_IN {1000 + n}'), flush=True)\n"
        "    time.sleep(interval)\n"
    )
    source = TegrastatsSource(tegrastats(tmp_path, rising), period_s=0.01)
    try:
        time.sleep(0.5)
        first, second = source.read(), source.read()
        assert first > 1.01
        assert 0 < second - first < 0.02
    finally:
        source.close()


def test_a_tegrastats_that_ends_is_an_error(tmp_path: Path) -> None:
    source = TegrastatsSource(tegrastats(tmp_path, "print(line, flush=True)\nsys.exit(3)"), period_s=0.02)
    try:
        with pytest.raises(SensorError, match="ended with exit status 3"):
            source.read()
    finally:
        source.close()


def test_a_tegrastats_that_falls_silent_is_an_error(tmp_path: Path) -> None:
    source = TegrastatsSource(tegrastats(tmp_path, "print(line, flush=True)\ntime.sleep(60)"), period_s=0.01)
    try:
        with pytest.raises(SensorError, match=r"wrote nothing for 0\.2 s"):
            source.read()
    finally:
        source.close()


def test_a_tegrastats_without_the_input_rail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SensorError, match="does not show the module's input"):
        TegrastatsSource(tegrastats(tmp_path, f"print({JETPACK_7!r}, flush=True)\ntime.sleep(60)"))
    with pytest.raises(SensorError, match="not installed"):
        TegrastatsSource(str(tmp_path / "missing"))


# powercap


def powercap(root: Path, energies: dict[str, tuple[str, int]], range_uj: int = 262_143_328_850) -> Path:
    folder = root / "sys/class/powercap"
    for zone, (name, energy) in energies.items():
        write(folder / zone / "name", name)
        write(folder / zone / "energy_uj", energy)
        write(folder / zone / "max_energy_range_uj", range_uj)
    return folder


TWO_PACKAGES = {
    "intel-rapl:0": ("package-0", 5_000_000),
    "intel-rapl:0:0": ("core", 1_000_000),
    "intel-rapl:1": ("package-1", 7_000_000),
    "intel-rapl:2": ("psys", 99_000_000),
    "intel-rapl-mmio:0": ("package-0", 5_000_000),
}


def test_packages_are_added_and_nothing_counts_twice(tmp_path: Path) -> None:
    powercap(tmp_path, TWO_PACKAGES)
    source = PowercapSource(tmp_path)
    assert (source.sensor, source.counter) == ("package-0 + package-1", True)
    assert source.read() == pytest.approx(12.0)


def test_a_counter_that_wraps_around_goes_on_rising(tmp_path: Path) -> None:
    folder = powercap(tmp_path, {"intel-rapl:0": ("package-0", 0)}, range_uj=10_000_000)
    source = PowercapSource(tmp_path)
    joules = []
    for true_uj in range(0, 45_000_000, 3_000_000):
        write(folder / "intel-rapl:0/energy_uj", true_uj % 10_000_000)
        joules.append(source.read())
    assert joules == pytest.approx([true_uj / 1e6 for true_uj in range(0, 45_000_000, 3_000_000)])


def test_no_package_and_garbage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SensorError, match="no energy counter"):
        PowercapSource(tmp_path)
    folder = powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    write(folder / "intel-rapl:0/energy_uj", "n/a")
    with pytest.raises(SensorError, match="energy_uj: holds 'n/a', not a number"):
        PowercapSource(tmp_path)


def test_counters_that_only_root_may_read_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    open_ = os.open

    def refuse(path: Path, flags: int, *arguments: int) -> int:
        if path == folder / "intel-rapl:0/energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SensorError, match="energy_uj: permission denied; run as root"):
        PowercapSource(tmp_path)


# NVML, through a stand-in for the module that nvidia-ml-py installs


def fake_nvml(milliwatts: Callable[[], int]) -> types.ModuleType:
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def handle(index: int) -> int:
        if index != 0:
            raise NVMLError("Invalid Argument")
        return index

    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetName=lambda _: b"NVIDIA GeForce RTX 4090",
        nvmlDeviceGetPowerUsage=lambda _: milliwatts(),
    )
    return module


def test_nvml_tells_the_power_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(lambda: 61_500))
    source = NvmlSource()
    assert (source.read(), source.sensor) == (61.5, "GPU 0 (NVIDIA GeForce RTX 4090)")
    source.close()
    with pytest.raises(SensorError, match="GPU 1: Invalid Argument"):
        NvmlSource(1)


def test_nvml_on_orin_knows_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported() -> int:
        raise module.NVMLError("Not Supported")

    module = fake_nvml(unsupported)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(SensorError, match="Not Supported"):
        NvmlSource()


def test_without_nvml_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SensorError, match="pip install nvidia-ml-py"):
        NvmlSource()


# jtop, through a stand-in; test_power_jtop.py runs the real one


def fake_jtop(total: object, *, fails: str | None = None) -> types.ModuleType:
    """What of jetson-stats 7.2 the adapter uses: `ok` waits for the next value and raises what the thread met."""
    module = types.ModuleType("jtop")

    class Client:
        def __init__(self, interval: float = 1.0) -> None:
            self.interval = interval
            self.alive = False

        def start(self) -> None:
            if fails:
                raise RuntimeError(fails)
            self.alive = True

        def ok(self, spin: bool = False) -> bool:
            time.sleep(0 if spin else self.interval)
            if self.alive == "lost":
                raise RuntimeError("Lost connection with jtop server")
            return bool(self.alive)

        @property
        def power(self) -> object:
            return {"rail": {}, "tot": total} if total is not None else {}

        def close(self) -> None:
            self.alive = False

    module.jtop = Client  # type: ignore[attr-defined]
    return module


TOTAL = {"volt": 4984, "curr": 1596, "power": 7954, "avg": 5000, "online": True, "name": "VDD_IN"}


def test_jtop_gives_its_total_and_never_its_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop(TOTAL))
    write(tmp_path / "run/jtop.sock", "")
    source = JtopSource(0.02, tmp_path)
    assert (source.read(), source.sensor, source.period_s, source.paced) == (7.954, "VDD_IN", 0.02, True)
    source._client.alive = "lost"
    with pytest.raises(SensorError, match="went away: Lost connection"):
        source.read()
    source.close()
    with pytest.raises(SensorError, match="sends nothing any more"):
        source.read()


def test_jtop_without_service_sensors_or_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SensorError, match=r"no .*/run/jtop\.sock \(pip install jetson-stats, then sudo jtop"):
        JtopSource(0.01, tmp_path)
    write(tmp_path / "run/jtop.sock", "")
    inactive = "The jtop.service is not active. Please run:\nsudo jtop --install-service"
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop(TOTAL, fails=inactive))
    with pytest.raises(SensorError, match=r"does not answer: The jtop\.service is not active\. Please run: sudo jtop"):
        JtopSource(0.01, tmp_path)
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop(None))
    with pytest.raises(SensorError, match="no power sensors"):
        JtopSource(0.01, tmp_path)
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop({"name": "VDD_IN"}))
    with pytest.raises(SensorError, match="has no power"):
        JtopSource(0.01, tmp_path)
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(SensorError, match=r"pip install 'remoe-edge\[jetson\]'"):
        JtopSource(0.01, tmp_path)


# Choice


def only_sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No programs and no packages with sensors, whatever this machine has."""
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    monkeypatch.setitem(sys.modules, "jtop", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_on_a_jetson_sysfs_is_chosen_before_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_sysfs(monkeypatch, tmp_path)
    powercap(orin_nx(tmp_path), TWO_PACKAGES)
    choice = find_source(root=tmp_path)
    assert (choice.source.name, choice.source.sensor) == ("ina3221", "VDD_IN")
    assert "whole module" in choice.why


def test_the_next_best_sensor_is_chosen_and_the_reason_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_sysfs(monkeypatch, tmp_path)
    powercap(tmp_path, TWO_PACKAGES)
    choice = find_source(root=tmp_path)
    assert (choice.source.name, "CPU package only" in choice.why) == ("powercap", True)
    monkeypatch.setitem(sys.modules, "jtop", fake_jtop(TOTAL))
    write(tmp_path / "run/jtop.sock", "")
    assert find_source(root=tmp_path).source.name == "jtop"
    endless = "while True:\n    print(line, flush=True)\n    time.sleep(interval)\n"
    monkeypatch.setenv("PATH", os.path.dirname(tegrastats(tmp_path, endless)))
    choice = find_source(root=tmp_path)
    assert choice.source.name == "tegrastats"
    choice.source.close()


def test_without_sensors_the_choice_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_sysfs(monkeypatch, tmp_path)
    choice = find_source(root=tmp_path)
    assert isinstance(choice.source, NoSource)
    for name in "ina3221", "jtop", "tegrastats", "powercap":
        assert name in choice.why
    assert isinstance(find_source("none", root=tmp_path).source, NoSource)


def test_a_sensor_asked_for_by_name_must_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_sysfs(monkeypatch, tmp_path)
    for name in set(SOURCES) - {"none"}:
        with pytest.raises(RemoeError, match=f"power source {name} does not work here"):
            find_source(name, root=tmp_path)
    with pytest.raises(RemoeError, match="choose one of auto, ina3221"):
        find_source("wattmeter", root=tmp_path)
    ina3221(tmp_path, 7)
    assert find_source("ina3221", root=tmp_path).source.read() == pytest.approx(RAILS["VDD_IN"][0] * 1596 / 1e6)
