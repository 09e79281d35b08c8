"""What machine this is: device, JetPack, kernel, CPU, memory."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.device.sysfs import text

_RELEASE = re.compile(r"R(\d+).*REVISION: (\d+(?:\.\d+)*)")

# From NVIDIA's JetPack archive; what is newer is named by its first number only.
_JETPACK = {
    "36.3": "6.0",
    "36.3.0": "6.0",
    "36.4": "6.1",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
    "39.2.2": "7.2.2",
}
_JETPACK_MAJOR = {"35": "5", "36": "6", "38": "7", "39": "7"}


@dataclass(frozen=True)
class Identity:
    """What does not change while the machine is up. None: not known.

    Attributes
    ----------
    device
        Model as firmware calls it, such as "NVIDIA Jetson Orin NX Engineering Reference Developer Kit".
    jetson
        Whether it is an NVIDIA Jetson.
    l4t, jetpack
        Such as "36.4.7" and "6.2.1"; None elsewhere, and in a container that does not show ``/etc/nv_tegra_release``.
    memory_bytes
        As the kernel sees it.
    """

    device: str | None
    jetson: bool
    l4t: str | None
    jetpack: str | None
    kernel: str
    architecture: str
    cpu: str | None
    cores: int
    memory_bytes: int | None


def identity(root: Path = Path("/")) -> Identity:
    """Identity of the machine whose ``proc``, ``sys`` and ``etc`` are in `root`."""
    l4t = _l4t(text(root / "etc/nv_tegra_release"))
    return Identity(
        device=text(root / "proc/device-tree/model") or _dmi(root),
        jetson=is_jetson(root),
        l4t=l4t,
        jetpack=_jetpack(l4t),
        kernel=text(root / "proc/sys/kernel/osrelease") or platform.release(),
        architecture=platform.machine(),
        cpu=_cpu(root),
        cores=os.cpu_count() or 1,
        memory_bytes=meminfo(root).get("MemTotal"),
    )


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether the machine is a Jetson; also true inside its containers, which see the device tree."""
    compatible = text(root / "proc/device-tree/compatible") or ""
    return "nvidia,tegra" in compatible or (root / "etc/nv_tegra_release").exists()


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """``/proc/meminfo`` in bytes; empty if it cannot be read."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", text(root / "proc/meminfo") or "", re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


def _l4t(release: str | None) -> str | None:
    match = _RELEASE.search(release or "")
    return f"{match[1]}.{match[2]}" if match else None


def _jetpack(l4t: str | None) -> str | None:
    if l4t is None:
        return None
    major = l4t.partition(".")[0]
    if major == "35":
        # L4T 35.<n>.<m> came with JetPack 5.<n - 1>.<...>, not regularly enough to say more.
        return "5"
    return _JETPACK.get(l4t, _JETPACK_MAJOR.get(major))


def _dmi(root: Path) -> str | None:
    folder = root / "sys/class/dmi/id"
    parts = [text(folder / name) for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part) or None


def _cpu(root: Path) -> str | None:
    cpuinfo = text(root / "proc/cpuinfo") or ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if match:
        return match[1].strip()
    part = re.search(r"^CPU part\s*:\s*(\w+)$", cpuinfo, re.MULTILINE)
    return {"0xd42": "Cortex-A78AE"}.get(part[1], f"ARM part {part[1]}") if part else None
