"""`remoe-edge doctor`: each thing that makes a benchmark invalid is found, on faked trees and on this machine."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_jetson import VDD_IN_WATTS, cpufreq, orin_nx, write
from gguf_maker import write_base

from remoe_edge.device import doctor, probes
from remoe_edge.device.disk import PcieLink, disk_of
from remoe_edge.device.doctor import NOTE, OK, PROBLEM, Finding, Options, examine, valid
from remoe_edge.device.memory import holders
from remoe_edge.device.probes import probe_direct, probe_io_uring
from remoe_edge.errors import RemoeError


@pytest.fixture(autouse=True)
def _short_look_at_the_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SENSOR_S", 0.08)


def found(root: Path, **options: Any) -> dict[str, Finding]:
    """Findings by topic; the first of a topic counts. Without measuring the storage."""
    given = {"storage": False, "environment": {}, "folder": root, **options}
    by_topic: dict[str, Finding] = {}
    for finding in examine(Options(root=root, **given)):
        by_topic.setdefault(finding.topic, finding)
    return by_topic


def steady(root: Path, jetpack: int = 6) -> Path:
    """An Orin NX as it should be: clocks fixed, nothing else running."""
    orin_nx(root, jetpack)
    if jetpack == 6:
        write(root / "etc/nv_tegra_release", "# R36 (release), REVISION: 5.0, ...")
    for core in range(8):
        cpufreq(root, core, low=1984000, high=1984000, now=1984000)
    write(root / "sys/class/devfreq/17000000.gpu/min_freq", 1173000000)
    write(root / "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    return root


@pytest.mark.parametrize("jetpack", [6, 7])
def test_a_jetson_as_it_should_be_is_valid(tmp_path: Path, jetpack: int) -> None:
    findings = found(steady(tmp_path, jetpack))
    assert valid(list(findings.values()))
    for topic in "device", "jetpack", "kernel", "power mode", "clocks", "temperature", "load", "memory", "power sensor":
        assert findings[topic].level == OK, findings[topic]
    assert "Orin NX" in findings["device"].found
    assert findings["jetpack"].values["jetpack"] == {6: "6.2.2", 7: "7.2.1"}[jetpack]
    assert findings["power mode"].found == "nvpmodel mode MAXN_SUPER (id 0)"
    assert findings["power sensor"].values["watts"] == pytest.approx(VDD_IN_WATTS)
    assert findings["power sensor"].values["sensor"] == "VDD_IN"


def test_another_power_mode_is_a_problem_unless_it_is_the_wanted_one(tmp_path: Path) -> None:
    write(steady(tmp_path) / "var/lib/nvpmodel/status", "pmode:0003")
    finding = found(tmp_path)["power mode"]
    assert (finding.level, finding.found) == (PROBLEM, "nvpmodel mode 25W (id 3), not the mode without limits (MAXN)")
    assert finding.advice is not None
    assert "sudo nvpmodel -m 0" in finding.advice
    assert "--power-mode 25W" in finding.advice
    assert found(tmp_path, power_mode="25w")["power mode"].level == OK
    wrong = found(tmp_path, power_mode="15W")["power mode"]
    assert wrong.level == PROBLEM
    assert wrong.advice is not None
    assert "sudo nvpmodel -m 2" in wrong.advice


def test_an_unknown_power_mode_is_a_problem(tmp_path: Path) -> None:
    (steady(tmp_path) / "var/lib/nvpmodel/status").unlink()
    finding = found(tmp_path)["power mode"]
    assert finding.level == PROBLEM
    assert finding.advice is not None
    assert "-v /var/lib/nvpmodel:/var/lib/nvpmodel:ro" in finding.advice


def test_a_power_mode_where_there_are_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match="only a Jetson has"):
        found(tmp_path, power_mode="MAXN")


@pytest.mark.parametrize(
    ("path", "content", "topic", "level", "said"),
    [
        ("sys/class/devfreq/17000000.gpu/min_freq", 306000000, "clocks", NOTE, "jetson_clocks is off"),
        ("sys/class/thermal/thermal_zone4/temp", 75000, "temperature", NOTE, "75 °C"),
        ("sys/class/thermal/thermal_zone4/temp", 95000, "temperature", PROBLEM, "95 °C"),
        ("sys/class/thermal/cooling_device1/cur_state", 2, "throttling", PROBLEM, "cpu-throttle-alert"),
        ("sys/class/hwmon/hwmon4/oc3_event_cnt", 37, "throttling", NOTE, "oc3 37 times"),
        ("proc/loadavg", f"{8.0 * (os.cpu_count() or 1)} 1 1 1/1 1", "load", PROBLEM, "in the last minute"),
        ("proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 4000000 kB", "memory", NOTE, "3.81 GiB of 15.26 GiB"),
        ("proc/swaps", "Filename Type\n/dev/zram0 partition 1 0 5", "swap", NOTE, "zram"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]", "huge pages", NOTE, "never"),
        ("etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, ...", "jetpack", NOTE, "JetPack 5 (L4T 35.4.1)"),
        ("proc/sys/kernel/osrelease", "5.10.120-tegra", "kernel", NOTE, "5.10.120"),
        ("sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input", 0, "power sensor", NOTE, "0.0 W"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet", "trap", NOTE, "hpet"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, path: str, content: object, topic: str, level: str, said: str) -> None:
    write(steady(tmp_path) / path, content)
    findings = found(tmp_path)
    finding = findings[topic]
    assert (finding.level, said in finding.found) == (level, True), finding
    assert finding.advice
    assert valid(list(findings.values())) == (level != PROBLEM)


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("CUDA_SCALE_LAUNCH_QUEUES", "4x", PROBLEM),
        ("CUDA_SCALE_LAUNCH_QUEUES", "1x", None),
        ("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "1", NOTE),
        ("LLAMA_ARG_EXPERT_CACHE", "16s", NOTE),
        ("LLAMA_CPP_LIB_PATH", "/elsewhere", PROBLEM),
        ("PATH", "/bin", None),
    ],
)
def test_traps_in_the_environment(tmp_path: Path, name: str, value: str, level: str | None) -> None:
    finding = found(steady(tmp_path), environment={name: value}).get("trap")
    assert (finding.level if finding else None) == level
    if finding:
        assert finding.advice == f"unset {name}"


def test_launch_queues_matter_on_an_integrated_gpu_only(tmp_path: Path) -> None:
    assert found(tmp_path, environment={"CUDA_SCALE_LAUNCH_QUEUES": "4x"})["trap"].level == NOTE


def test_the_release_with_failing_allocations_is_named(tmp_path: Path) -> None:
    assert "trap" not in found(steady(tmp_path))
    write(tmp_path / "etc/nv_tegra_release", "# R36 (release), REVISION: 4.7, ...")
    assert "NvMap" in found(tmp_path)["trap"].found


def test_memory_is_told_with_those_who_hold_it(tmp_path: Path) -> None:
    steady(tmp_path)
    for pid, name, kib in (11, "gnome-shell", 300_000), (12, "sshd", 2_000), (13, "trtexec", 150_000):
        write(tmp_path / f"proc/{pid}/status", f"Name:\t{name}\nRssAnon:\t{kib} kB\nRssFile:\t9 kB\nRssShmem:\t0 kB")
    write(
        tmp_path / "sys/kernel/debug/nvmap/iovmm/clients",
        "CLIENT                        PROCESS      PID        SIZE\n"
        "user                          trtexec       13    4194304K\n"
        "total                                             4194304K",
    )
    assert [(holder.name, holder.total) for holder in holders(tmp_path)] == [
        ("trtexec", (150_000 + 4_194_304) * 1024),
        ("gnome-shell", 300_000 * 1024),
        ("sshd", 2_000 * 1024),
    ]
    findings = found(tmp_path)
    assert "held by trtexec (pid 13) 4.14 GiB, gnome-shell (pid 11) 292.97 MiB" in findings["memory"].found
    assert findings["desktop"].level == NOTE


def test_processes_of_this_machine_are_seen() -> None:
    code = "x = bytearray(200 << 20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        held = {holder.pid: holder.total for holder in holders()}
        child.communicate(b"\n")
    assert 200 << 20 <= held[child.pid] < 300 << 20


# Storage


def nvme(root: Path, *, speed: str = "16.0 GT/s PCIe", filesystem: str = "ext4") -> Path:
    device = root / "sys/devices/pci0004:00/0004:00:00.0/0004:01:00.0"
    block = device / "nvme/nvme0/nvme0n1"
    for name, value in (("current_link_speed", speed), ("current_link_width", 4)):
        write(device / name, value)
    write(device / "max_link_speed", "16.0 GT/s PCIe")
    write(device / "max_link_width", 4)
    # The bridge above has a link of its own, which is not the drive's.
    write(device.parent / "current_link_speed", "2.5 GT/s PCIe")
    write(block / "nvme0n1p1/partition", 1)
    write(block / "queue/rotational", 0)
    write(block / "device/model", "Samsung SSD 980 PRO 1TB")
    for folder in "sys/dev/block", "sys/class/block":
        (root / folder).mkdir(parents=True)
    (root / "sys/dev/block/259:1").symlink_to(block / "nvme0n1p1")
    (root / "sys/class/block/nvme0n1p1").symlink_to(block / "nvme0n1p1")
    number = "259:1" if filesystem != "btrfs" else "0:31"
    write(
        root / "proc/self/mountinfo",
        "22 1 0:21 / /proc rw - proc proc rw\n"
        f"27 1 {number} / / rw,relatime - {filesystem} /dev/nvme0n1p1 rw\n"
        "28 27 0:40 / /dev/shm rw - tmpfs tmpfs rw\n"
        "29 27 0:41 / /mnt/my\\040models rw,relatime - nfs4 server:/models rw",
    )
    return root


@pytest.mark.parametrize("filesystem", ["ext4", "btrfs"])
def test_the_drive_and_its_link_are_found(tmp_path: Path, filesystem: str) -> None:
    disk = disk_of(Path("/home/user/model.gguf"), nvme(tmp_path, filesystem=filesystem))
    assert disk is not None
    assert (disk.mount, disk.filesystem, disk.kind, disk.device) == ("/", filesystem, "nvme", "nvme0n1")
    assert (disk.model, disk.link) == ("Samsung SSD 980 PRO 1TB", PcieLink(16.0, 4, 16.0, 4))
    assert disk.link is not None
    assert disk.link.bytes_per_s == pytest.approx(7.877e9, rel=1e-3)


def test_memory_and_network_are_told_from_drives(tmp_path: Path) -> None:
    nvme(tmp_path)
    for path, kind in ("/dev/shm/model.gguf", "memory"), ("/mnt/my models/a.gguf", "network"):
        disk = disk_of(Path(path), tmp_path)
        assert disk is not None
        assert disk.kind == kind
    assert disk_of(Path("/x"), tmp_path / "missing") is None


def test_a_link_that_trained_lower_is_a_note(tmp_path: Path) -> None:
    nvme(steady(tmp_path), speed="8.0 GT/s PCIe")
    finding = found(tmp_path)["storage link"]
    assert (finding.level, finding.found) == (
        NOTE,
        "PCIe 8 GT/s x4, at most 3.9 GB/s; the drive can do 16 GT/s x4",
    )


def test_models_in_memory_are_a_problem(tmp_path: Path) -> None:
    write(steady(tmp_path) / "proc/self/mountinfo", f"28 27 0:40 / {tmp_path.resolve()} rw - tmpfs tmpfs rw")
    findings = found(tmp_path)
    assert findings["storage"].level == PROBLEM
    assert not valid(list(findings.values()))


def test_the_storage_is_measured_on_a_file_that_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_FILE_BYTES", 64 << 20)
    stages: list[tuple[str, float | None]] = []
    options = Options(folder=tmp_path, environment={})
    findings = {finding.topic: finding for finding in examine(options, lambda *stage: stages.append(stage))}
    speed = findings["storage speed"]
    assert speed.values["bytes_per_s"] > 0
    assert (speed.values["read_bytes"], speed.values["depth"]) == (1 << 20, 4)
    assert list(tmp_path.iterdir()) == []
    assert [stage for stage, _ in stages] == ["writing 64 MiB to measure the storage"] * 4 + [
        "measuring the storage"
    ] * 5


def test_a_full_or_closed_folder_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_FILE_BYTES", 1 << 60)
    findings = {finding.topic: finding for finding in examine(Options(folder=tmp_path, environment={}))}
    assert (findings["storage speed"].level, findings["storage speed"].values) == (NOTE, {})
    assert "No space left on device" in findings["storage speed"].found
    findings = {finding.topic: finding for finding in examine(Options(folder=Path("/proc"), environment={}))}
    assert findings["O_DIRECT"].level == NOTE


def test_a_model_is_measured_in_place_of_a_file(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base.gguf")
    findings = {finding.topic: finding for finding in examine(Options(model=model, environment={}))}
    assert findings["storage speed"].values["bytes_per_s"] > 0
    assert findings["memory"].values["model_bytes"] == model.stat().st_size
    assert "the model has" in findings["memory"].found


# Probes


def test_direct_reads_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    assert probe_direct(path) is None
    (tmp_path / "empty").touch()
    assert probe_direct(tmp_path / "empty") == "the file is empty"
    assert "No such file" in str(probe_direct(tmp_path / "missing"))

    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument", str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert probe_direct(path) == "this filesystem has no O_DIRECT"


def test_io_uring_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Found out without the code under test: a process that may not use the system call.
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    if setting.exists() and setting.read_text().strip() == "0":
        assert probe_io_uring() in (None, "not permitted; container runtimes forbid it by default")
    # No such system call, as on a kernel without it.
    monkeypatch.setattr(probes, "_IO_URING_SETUP", 9999)
    assert probe_io_uring() == "the kernel has no io_uring"


def test_why_io_uring_is_refused(tmp_path: Path) -> None:
    assert probes._refusal(errno.EPERM, tmp_path) == "not permitted; container runtimes forbid it by default"
    write(tmp_path / "proc/sys/kernel/io_uring_disabled", 2)
    assert probes._refusal(errno.EPERM, tmp_path) == "kernel.io_uring_disabled is 2"
    assert probes._refusal(errno.ENOMEM, tmp_path) == "Cannot allocate memory"


# The command


def run_doctor(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "remoe_edge", "doctor", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "CUDA_", "GGML_"))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**kept, **environment})


def test_the_exit_status_says_whether_a_benchmark_would_be_valid() -> None:
    result = run_doctor("--no-storage", "--json")
    answer = json.loads(result.stdout)
    levels = {finding["level"] for finding in answer["findings"]}
    assert levels <= {"ok", "note", "problem"}
    assert answer["valid"] == ("problem" not in levels)
    assert result.returncode == (0 if answer["valid"] else 1)
    broken = run_doctor("--no-storage", "--json", LLAMA_CPP_LIB_PATH="/elsewhere")
    assert broken.returncode == 1
    assert json.loads(broken.stdout)["valid"] is False


def test_the_text_says_what_to_do() -> None:
    result = run_doctor("--no-storage", LLAMA_CPP_LIB_PATH="/elsewhere")
    assert result.returncode == 1
    assert "→ unset LLAMA_CPP_LIB_PATH" in result.stdout
    assert "A benchmark here would not be valid" in result.stdout
    assert result.stderr == ""


def test_flags_without_effect_are_refused(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base.gguf")
    for arguments in ([str(model), "--folder", "."], ["--no-storage", "--folder", "."], ["missing.gguf"]):
        assert run_doctor(*arguments).returncode == 2
    assert "Exit status: 0" in run_doctor("--help").stdout
