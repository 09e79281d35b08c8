"""Examines the machine before a benchmark: what would make its result wrong, or hard to compare."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remoe_edge import __version__
from remoe_edge.device.disk import Disk, disk_of
from remoe_edge.device.identity import Identity, identity, meminfo
from remoe_edge.device.memory import holders
from remoe_edge.device.probes import probe_direct, probe_io_uring
from remoe_edge.device.state import Snapshot, configured_modes, snapshot, temperature
from remoe_edge.device.sysfs import number, text
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.cgroup import CgroupUnavailableError, memory_group
from remoe_edge.measure.storage import Slice, expert_slices, measure_bandwidth
from remoe_edge.power.find import find_source
from remoe_edge.power.sampler import Sampler
from remoe_edge.power.source import NoSource
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.llama import gpu_devices
from remoe_edge.runtime.pin import load_pin, patches_digest, patches_dir
from remoe_edge.runtime.wheel import installed_manifest
from remoe_edge.sizes import format_size

OK, NOTE, PROBLEM = "ok", "note", "problem"

_FILE_BYTES = 1 << 30
_WRITE_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_DEPTH = 4
_SENSOR_S = 0.5
_HOT_C = 70.0
_TOO_HOT_C = 90.0
_BUSY_SHARE = 0.5
_SLOW_BYTES_PER_S = 500e6
_GROUP_BYTES = 64 << 20
_SHOWN_HOLDERS = 3
_HOLDER_BYTES = 100 << 20
_SHOW_MODE = "-v /var/lib/nvpmodel:/var/lib/nvpmodel:ro -v /etc/nvpmodel.conf:/etc/nvpmodel.conf:ro"
# Other cooling devices are fans, displays and settings, which are above zero without slowing anything.
_SLOWING = re.compile(r"cpu|gpu|processor|powerclamp|devfreq|throttle", re.IGNORECASE)
_DESKTOP = {"gnome-shell", "Xorg", "Xwayland", "kwin_x11", "kwin_wayland"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    level
        "ok"; "note": worth knowing, results hold; "problem": a benchmark would not be valid.
    found, advice
        Sentences for people; `advice` is None where there is nothing to do.
    values
        The same for programs.
    """

    topic: str
    level: str
    found: str
    advice: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What to examine.

    Attributes
    ----------
    model
        A GGUF whose experts are read to measure the storage; else a temporary file is.
    folder
        Where that temporary file goes; models are expected on the same drive.
    storage
        Measure the storage at all.
    power_mode
        The nvpmodel mode that is wanted, by name; by default the one without limits (MAXN, MAXN_SUPER).
    root, environment
        Where ``proc`` and ``sys`` are, and the variables that programs started from here would see.
    """

    model: Path | None = None
    folder: Path = Path(".")
    storage: bool = True
    power_mode: str | None = None
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def examine(options: Options, report: Report = silent) -> list[Finding]:
    """All findings, topic by topic. Writes at most one temporary file, without a name, and changes nothing else.

    Raises RemoeError if the model cannot be read.
    """
    device, state = identity(options.root), snapshot(options.root)
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _device(device),
        lambda: _power_mode(options, device, state),
        lambda: _clocks(device, state),
        lambda: _heat(options, state),
        lambda: _load(options, device),
        lambda: _memory(options, device),
        lambda: _pages(options),
        lambda: _group(),
        lambda: _storage(options, report),
        lambda: _reads(options),
        lambda: _sensor(options),
        lambda: _runtime(device),
        lambda: _traps(options, device),
    ]
    return [finding for check in checks for finding in check()]


def valid(findings: list[Finding]) -> bool:
    """Whether a benchmark would be valid: nothing found is a problem."""
    return all(finding.level != PROBLEM for finding in findings)


def _device(device: Identity) -> Iterator[Finding]:
    memory = format_size(device.memory_bytes) if device.memory_bytes else "unknown memory"
    name = device.device or device.cpu or "unknown machine"
    values = {name: getattr(device, name) for name in ("device", "jetson", "cpu", "cores", "architecture")}
    found = f"{name}: {device.cores} cores ({device.cpu or device.architecture}), {memory}"
    yield Finding("device", OK, found, values={**values, "memory_bytes": device.memory_bytes})
    if device.jetson:
        values = {"l4t": device.l4t, "jetpack": device.jetpack}
        if device.l4t is None:
            advice = "in a container, show it: -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro"
            yield Finding("jetpack", NOTE, "JetPack and L4T are not known here", advice, values)
        elif device.l4t.startswith("35."):
            advice = "JetPack 6.2 or newer is what this project is made for"
            yield Finding("jetpack", NOTE, f"JetPack {device.jetpack} (L4T {device.l4t})", advice, values)
        else:
            yield Finding("jetpack", OK, f"JetPack {device.jetpack or '?'} (L4T {device.l4t})", values=values)
    version = tuple(int(part) for part in re.findall(r"\d+", device.kernel)[:2])
    values = {"kernel": device.kernel}
    if version < (5, 14):
        advice = "mmap mode reads more slowly before Linux 5.14 (MADV_POPULATE_READ); prefer --io direct"
        yield Finding("kernel", NOTE, f"Linux {device.kernel}", advice, values)
    else:
        yield Finding("kernel", OK, f"Linux {device.kernel}", values=values)


def _power_mode(options: Options, device: Identity, state: Snapshot) -> Iterator[Finding]:
    keys = ("power_mode", "power_mode_id", "cpu_governor", "platform_profile", "on_battery")
    values = {key: state[key] for key in keys}
    if state["on_battery"]:
        yield Finding("power mode", PROBLEM, "running on battery", "plug the charger in", values)
    if not device.jetson:
        if options.power_mode is not None:
            raise RemoeError(f"--power-mode {options.power_mode}: only a Jetson has nvpmodel's modes")
        if state["cpu_governor"] is None:
            found = "the CPU's clock is not controlled from here, as in most virtual machines"
            yield Finding("power mode", NOTE, found, "compare results from one boot of one host only", values)
        elif state["cpu_governor"] != "performance":
            found = f"the CPU governor is {state['cpu_governor']}"
            advice = "for steadier times: sudo cpupower frequency-set -g performance"
            yield Finding("power mode", NOTE, found, advice, values)
        else:
            yield Finding("power mode", OK, "the CPU governor is performance", values=values)
        return
    mode, mode_id = state["power_mode"], state["power_mode_id"]
    if mode is None and mode_id is None:
        advice = f"in a container, show it: {_SHOW_MODE}"
        found = "the power mode is not known, so results cannot be compared"
        yield Finding("power mode", PROBLEM, found, advice, values)
        return
    modes = configured_modes(options.root)
    if options.power_mode is not None:
        right = [number_ for number_, name in modes.items() if name.lower() == options.power_mode.lower()]
        wanted = options.power_mode
        is_right = (mode or "").lower() == wanted.lower()
    else:
        right = [number_ for number_, name in modes.items() if name.startswith("MAXN")]
        wanted = "the mode without limits (MAXN)"
        is_right = (mode or "").startswith("MAXN")
    found = f"nvpmodel mode {mode or '?'}" + ("" if mode_id is None else f" (id {mode_id})")
    if is_right:
        yield Finding("power mode", OK, found, values=values)
    else:
        switch = f"sudo nvpmodel -m {right[0]}" if right else "see the modes in /etc/nvpmodel.conf"
        advice = f"switch: {switch}; or, to measure in this mode on purpose: --power-mode {mode or 'NAME'}"
        yield Finding("power mode", PROBLEM, f"{found}, not {wanted}", advice, values)


def _clocks(device: Identity, state: Snapshot) -> Iterator[Finding]:
    values = {key: value for key, value in state.items() if key.endswith("_mhz")}
    values |= {key: state[key] for key in ("jetson_clocks", "cpu_online", "cpu_boost")}
    parts = [
        f"{name} {state[f'{key}_min_mhz']}-{state[f'{key}_max_mhz']} MHz"
        for name, key in (("CPU", "cpu"), ("GPU", "gpu"))
        if state[f"{key}_max_mhz"] is not None
    ]
    if state["emc_mhz"] is not None:
        parts.append(f"memory {state['emc_mhz']} MHz")
    found = ", ".join(parts)
    if device.jetson and state["jetson_clocks"] is False:
        advice = "clocks climb during a run; fix them: sudo jetson_clocks"
        yield Finding("clocks", NOTE, f"{found}; jetson_clocks is off", advice, values)
    elif found:
        yield Finding("clocks", OK, found, values=values)


def _heat(options: Options, state: Snapshot) -> Iterator[Finding]:
    hottest = temperature(options.root)
    throttling = [name for name in state["cooling"] if _SLOWING.search(name)]
    values = {
        "temperature_c": hottest,
        "temperatures_c": state["temperatures_c"],
        "cooling": state["cooling"],
        "throttle_counts": state["throttle_counts"],
        "fan_rpm": state["fan_rpm"],
    }
    if hottest is None:
        yield Finding("temperature", NOTE, "no temperature sensor", "let the machine rest between runs", values)
    elif hottest >= _TOO_HOT_C:
        advice = "let it cool; improve cooling before measuring"
        yield Finding("temperature", PROBLEM, f"{hottest:.0f} °C, where chips slow down", advice, values)
    elif hottest >= _HOT_C:
        yield Finding("temperature", NOTE, f"{hottest:.0f} °C", "let it cool before measuring", values)
    else:
        fan = "" if state["fan_rpm"] is None else f", fan {state['fan_rpm']} rpm"
        yield Finding("temperature", OK, f"{hottest:.0f} °C{fan}", values=values)
    if throttling:
        found = f"clocks are being held down by {', '.join(throttling)}"
        yield Finding("throttling", PROBLEM, found, "let it cool; check fan and power supply", values)
    elif events := {name: count for name, count in state["throttle_counts"].items() if count}:
        found = f"throttled since boot: {', '.join(f'{name} {count} times' for name, count in events.items())}"
        advice = "oc1 is under-voltage, oc2 and oc3 over-current: a stronger supply; else cooling"
        yield Finding("throttling", NOTE, found, advice, values)


def _load(options: Options, device: Identity) -> Iterator[Finding]:
    try:
        load = float((text(options.root / "proc/loadavg") or "").split()[0])
    except (IndexError, ValueError):
        return
    found, values = f"load {load:g} on {device.cores} cores in the last minute", {"load": load}
    if load > _BUSY_SHARE * device.cores:
        yield Finding("load", PROBLEM, found, "other programs are at work: end them, then wait a minute", values)
    else:
        yield Finding("load", OK, found, values=values)


def _memory(options: Options, device: Identity) -> Iterator[Finding]:
    info, held = meminfo(options.root), holders(options.root)
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    largest = [holder for holder in held if holder.total >= _HOLDER_BYTES][:_SHOWN_HOLDERS]
    swap = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    values = {
        "total_bytes": total,
        "available_bytes": available,
        "swap_used_bytes": swap,
        "holders": [{"pid": holder.pid, "name": holder.name, "bytes": holder.total} for holder in largest],
    }
    found = f"{format_size(available)} of {format_size(total)} available"
    if largest:
        held_by = ", ".join(f"{holder.name} (pid {holder.pid}) {format_size(holder.total)}" for holder in largest)
        found += f"; held by {held_by}"
    if options.model is not None:
        size = sum(layout.path.stat().st_size for layout in read_model(options.model))
        values["model_bytes"] = size
        found += f"; the model has {format_size(size)}"
        if size < available:
            found += " and fits, so without --memory-limit it stays in the page cache after the first run"
    if available < total / 2:
        advice = "end what holds memory"
        if device.jetson:
            advice += "; before L4T 39 memory may look used after a CUDA program: sudo sysctl -w vm.drop_caches=3"
        yield Finding("memory", NOTE, found, advice, values)
    else:
        yield Finding("memory", OK, found, values=values)
    if swap:
        found = f"{format_size(swap)} are swapped out"
        yield Finding("swap", NOTE, found, "swapping costs time at random: sudo swapoff -a", {"swap_used_bytes": swap})
    if (text(options.root / "proc/swaps") or "").find("zram") >= 0:
        advice = "it compresses memory with CPU time; switch it off: sudo swapoff -a (JetPack: nvzramconfig)"
        yield Finding("swap", NOTE, "swap in compressed memory (zram) is on", advice)
    if device.jetson and (desktop := sorted({holder.name for holder in held} & _DESKTOP)):
        advice = "it holds memory and uses the GPU: sudo systemctl isolate multi-user.target"
        yield Finding("desktop", NOTE, f"a desktop is running ({', '.join(desktop)})", advice)


def _pages(options: Options) -> Iterator[Finding]:
    setting = re.search(r"\[(\w+)\]", text(options.root / "sys/kernel/mm/transparent_hugepage/enabled") or "")
    if setting is None:
        advice = "the cache's slots use small pages, which costs some speed"
        yield Finding("huge pages", NOTE, "the kernel has no transparent huge pages", advice)
    elif setting[1] == "never":
        advice = "slots use small pages; echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("huge pages", NOTE, "transparent huge pages: never", advice, {"setting": "never"})
    else:
        found = f"transparent huge pages: {setting[1]}"
        yield Finding("huge pages", OK, found, values={"setting": setting[1]})
    if not os.access(options.root / "proc/sys/vm/drop_caches", os.W_OK):
        advice = "run benchmarks as root, else only the model's own pages are dropped before each run"
        yield Finding("page cache", NOTE, "the page cache cannot be dropped", advice)


def _group() -> Iterator[Finding]:
    try:
        with memory_group(_GROUP_BYTES) as group:
            found = f"memory limits work (control groups, version {group.version})"
            yield Finding("memory limit", OK, found, values={"version": group.version})
    except CgroupUnavailableError as error:
        yield Finding("memory limit", NOTE, str(error), "without it, --memory-limit is not kept", {"version": None})


def _storage(options: Options, report: Report) -> Iterator[Finding]:
    path = options.model or options.folder
    disk = disk_of(path.resolve(), options.root)
    if disk is not None:
        yield from _disk(disk)
    if options.storage:
        yield _bandwidth(options, disk, report)


def _disk(disk: Disk) -> Iterator[Finding]:
    found = f"{disk.filesystem} at {disk.mount}, {disk.kind}"
    if disk.device:
        found += f" ({' '.join(part for part in (disk.device, disk.model) if part)})"
    values: dict[str, Any] = {"filesystem": disk.filesystem, "kind": disk.kind, "device": disk.device}
    advice = {
        "memory": "models here are in memory already; measure on a drive",
        "network": "speed depends on others; measure on a local drive",
        "container layer": "mount the models' folder into the container (-v)",
        "memory card or eMMC": "too slow to feed the cache; use an NVMe drive",
        "rotating": "too slow to feed the cache; use an NVMe drive",
    }.get(disk.kind)
    level = PROBLEM if disk.kind == "memory" else NOTE if advice else OK
    yield Finding("storage", level, found, advice, values)
    if disk.link is not None:
        link = disk.link
        values = {**vars(link), "bytes_per_s": link.bytes_per_s}
        found = f"PCIe {link}, at most {link.bytes_per_s / 1e9:.1f} GB/s"
        if link.bytes_per_s < 0.99 * link.max_bytes_per_s:
            most = f"{link.max_speed:g} GT/s x{link.max_width}"
            advice = "look for a better slot or seat the drive again; some boards have no more"
            yield Finding("storage link", NOTE, f"{found}; the drive can do {most}", advice, values)
        else:
            yield Finding("storage link", OK, found, values=values)


def _bandwidth(options: Options, disk: Disk | None, report: Report) -> Finding:
    try:
        if options.model is not None:
            slices = expert_slices(read_model(options.model))
            if not slices:
                slices = _pieces(options.model, options.model.stat().st_size)
            speed = measure_bandwidth(slices, _DEPTH, report=report)
        else:
            if shutil.disk_usage(options.folder).free < 2 * _FILE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryFile(dir=options.folder) as file:
                _fill(file.fileno(), report)
                slices = _pieces(Path(f"/proc/self/fd/{file.fileno()}"), _FILE_BYTES)
                speed = measure_bandwidth(slices, _DEPTH, report=report)
    except OSError as error:
        advice = f"name another --folder with {format_size(2 * _FILE_BYTES)} free, or a MODEL, or pass --no-storage"
        return Finding("storage speed", NOTE, f"not measured: {options.folder}: {error.strerror}", advice)
    values = vars(speed)
    found = (
        f"{speed.bytes_per_s / 1e9:.2f} GB/s in reads of {format_size(speed.read_bytes)}, {speed.depth} at once, "
        f"{'past' if speed.direct else 'through'} the page cache"
    )
    if speed.bytes_per_s < _SLOW_BYTES_PER_S:
        advice = "too slow to feed the cache: decoding will mostly wait; use an NVMe drive"
        return Finding("storage speed", NOTE, found, advice, values)
    if disk is not None and disk.link is not None and speed.bytes_per_s > disk.link.bytes_per_s:
        advice = "something between here and the drive keeps data in memory; limits computed from this are too low"
        return Finding("storage speed", NOTE, f"{found}, more than the link can carry", advice, values)
    return Finding("storage speed", OK, found, values=values)


def _pieces(path: Path, size: int) -> list[Slice]:
    return [Slice(path, start, min(_READ_BYTES, size - start)) for start in range(0, size, _READ_BYTES)]


def _fill(descriptor: int, report: Report) -> None:
    """Write the file to be measured, of bytes that no filesystem can compress."""
    block = os.urandom(_WRITE_BYTES)
    for start in range(0, _FILE_BYTES, _WRITE_BYTES):
        report(f"writing {format_size(_FILE_BYTES)} to measure the storage", start / _FILE_BYTES)
        view = memoryview(block)
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _reads(options: Options) -> Iterator[Finding]:
    if options.model is not None:
        direct = probe_direct(options.model)
    else:
        try:
            with tempfile.TemporaryFile(dir=options.folder) as file:
                file.write(bytes(_READ_BYTES))
                file.flush()
                direct = probe_direct(Path(f"/proc/self/fd/{file.fileno()}"))
        except OSError as error:
            direct = f"{options.folder}: {error.strerror}"
    if direct is None:
        yield Finding("O_DIRECT", OK, "reads past the page cache work", values={"works": True})
    else:
        advice = "reads go through the page cache, which costs memory and time; use ext4, xfs or btrfs"
        yield Finding("O_DIRECT", NOTE, direct, advice, {"works": False})
    ring = probe_io_uring(options.root)
    if ring is None:
        yield Finding("io_uring", OK, "io_uring works", values={"works": True})
    else:
        found, advice = f"no io_uring: {ring}", "nothing to do: reads use threads instead"
        yield Finding("io_uring", NOTE, found, advice, {"works": False})


def _sensor(options: Options) -> Iterator[Finding]:
    choice = find_source(root=options.root)
    if isinstance(choice.source, NoSource):
        advice = "energy will be reported as not measured; see docs/power.md for what each source needs"
        yield Finding("power sensor", NOTE, choice.why, advice, {"source": "none"})
        return
    with Sampler(choice.source) as sampler:
        time.sleep(max(_SENSOR_S, 3 * choice.source.period_s))
    recording = sampler.recording()
    values = {"source": recording.source, "sensor": recording.sensor, "samples": len(recording.t_ns)}
    values |= {"period_s": recording.period_s, "status": recording.status}
    name = f"{recording.source}, {recording.sensor}"
    if recording.status == "measured":
        watts = float(recording.watts.mean())
        found = f"{name}: {watts:.2f} W now, {1 / recording.period_s:.0f} readings per second ({choice.why})"
        yield Finding("power sensor", OK, found, values={**values, "watts": watts})
    else:
        found = f"{name}: {recording.reason or 'too few readings'}"
        yield Finding("power sensor", NOTE, found, "energy may be reported as not measured", values)


def _runtime(device: Identity) -> Iterator[Finding]:
    patches = patches_dir()
    pin, digest, installed = load_pin(patches), patches_digest(patches), installed_manifest()
    values: dict[str, Any] = {
        "remoe_edge": __version__,
        "patches": digest,
        "installed": vars(installed) if installed else None,
    }
    wanted = f"llama-cpp-python {pin.version}, patches {digest[:12]}"
    if installed is None:
        advice = "it is built when first needed; do it now: remoe-edge build"
        yield Finding("runtime", NOTE, f"remoe-edge {__version__} without its runtime ({wanted})", advice, values)
        return
    found = (
        f"remoe-edge {__version__}, llama-cpp-python {installed.llama_cpp_python} (llama.cpp {installed.llama_cpp}), "
        f"patches {installed.patches[:12]}, {'with' if installed.cuda else 'without'} CUDA"
    )
    if (installed.llama_cpp_python, installed.patches) != (pin.version, digest):
        yield Finding("runtime", NOTE, f"{found}; this version has {wanted}", "run remoe-edge build", values)
    elif installed.cuda and not (devices := gpu_devices()):
        values["devices"] = []
        advice = "look for the driver: nvidia-smi; in a container: --runtime nvidia"
        yield Finding("runtime", NOTE, f"{found}, but it sees no GPU", advice, values)
    elif installed.cuda:
        values["devices"] = [vars(each) for each in devices]
        names = ", ".join(f"{each.label}, {format_size(each.free)} free" for each in devices)
        yield Finding("runtime", OK, f"{found}: {names}", values=values)
    elif device.jetson:
        yield Finding("runtime", NOTE, found, "the GPU stays idle; remoe-edge build --cuda", values)
    else:
        yield Finding("runtime", OK, found, values=values)


def _traps(options: Options, device: Identity) -> Iterator[Finding]:
    """What is known to go wrong and cannot be seen from results; sources in docs/power.md."""
    environment = options.environment
    queues = environment.get("CUDA_SCALE_LAUNCH_QUEUES")
    if queues is not None and queues not in ("1x", ""):
        found = (
            f"CUDA_SCALE_LAUNCH_QUEUES={queues}: on an integrated GPU, decoding a MoE model hangs (llama.cpp #19219)"
        )
        advice = "unset CUDA_SCALE_LAUNCH_QUEUES"
        yield Finding(
            "trap", PROBLEM if device.jetson else NOTE, found, advice, {"variable": "CUDA_SCALE_LAUNCH_QUEUES"}
        )
    if environment.get("GGML_CUDA_ENABLE_UNIFIED_MEMORY"):
        found = "GGML_CUDA_ENABLE_UNIFIED_MEMORY is set: managed memory in place of the cache's own placement"
        advice = "unset GGML_CUDA_ENABLE_UNIFIED_MEMORY"
        yield Finding("trap", NOTE, found, advice, {"variable": "GGML_CUDA_ENABLE_UNIFIED_MEMORY"})
    for name in sorted(environment):
        if name.startswith("LLAMA_ARG_"):
            found = f"{name}={environment[name]} changes what llama.cpp's tools do"
            yield Finding("trap", NOTE, found, f"unset {name}", {"variable": name})
    if environment.get("LLAMA_CPP_LIB_PATH"):
        found = "LLAMA_CPP_LIB_PATH is set: Python would load other libraries than the ones built here"
        yield Finding("trap", PROBLEM, found, "unset LLAMA_CPP_LIB_PATH", {"variable": "LLAMA_CPP_LIB_PATH"})
    if device.l4t == "36.4.7":
        found = "L4T 36.4.7: CUDA allocations can fail with memory free (NvMapMemAllocInternalTagged, error 12)"
        advice = "sudo sysctl -w vm.drop_caches=3, reboot, or update to L4T 36.5"
        yield Finding("trap", NOTE, found, advice, {"l4t": device.l4t})
    clock = text(options.root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    if clock in ("hpet", "acpi_pm", "jiffies"):
        found = f"the kernel's clock is {clock}: reading it is slow and disturbs times"
        yield Finding("trap", NOTE, found, "see why: dmesg | grep -i -e tsc -e clocksource", {"clock": clock})
    if (number(options.root / "proc/sys/kernel/numa_balancing") or 0) > 0 and _nodes(options.root) > 1:
        found = "automatic NUMA balancing is on: pages move during runs"
        advice = "sudo sysctl -w kernel.numa_balancing=0"
        yield Finding("trap", NOTE, found, advice, {"numa_nodes": _nodes(options.root)})


def _nodes(root: Path) -> int:
    return len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
