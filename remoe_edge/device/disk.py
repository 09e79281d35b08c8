"""What a file lies on: filesystem, drive, and the PCIe link between drive and CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.device.sysfs import number, text

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "virtiofs"}
_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
# Of what a lane transfers, this part is data: 8b/10b coding up to 5 GT/s, 128b/130b above.
_OLD_CODING, _NEW_CODING, _OLD_CODING_GT = 8 / 10, 128 / 130, 5.0


@dataclass(frozen=True)
class PcieLink:
    """Speed in GT/s per lane, and lanes: now, and the most that the drive can do."""

    speed: float
    width: int
    max_speed: float
    max_width: int

    @property
    def bytes_per_s(self) -> float:
        """What the link carries now, without the overhead of packets."""
        return _bytes_per_s(self.speed, self.width)

    @property
    def max_bytes_per_s(self) -> float:
        return _bytes_per_s(self.max_speed, self.max_width)

    def __str__(self) -> str:
        return f"{self.speed:g} GT/s x{self.width}"


@dataclass(frozen=True)
class Disk:
    """Where a path lies. None: not known.

    Attributes
    ----------
    kind
        "nvme", "ufs or sata" (sd*), "memory card or eMMC" (mmcblk*), "virtual" (vd*, xvd*), "rotating", "network",
        "memory", "container layer" (overlay) or "other".
    """

    mount: str
    filesystem: str
    kind: str
    device: str | None = None
    model: str | None = None
    link: PcieLink | None = None


def disk_of(path: Path, root: Path = Path("/")) -> Disk | None:
    """The disk that `path`, absolute and without links, lies on; None if the kernel's list of mounts lacks it."""
    mount = _mount_of(path, text(root / "proc/self/mountinfo") or "")
    if mount is None:
        return None
    point, number_, filesystem, source = mount
    if filesystem in _MEMORY:
        return Disk(point, filesystem, "memory")
    if filesystem in _NETWORK or filesystem.startswith("fuse.sshfs"):
        return Disk(point, filesystem, "network", source)
    if filesystem == "overlay":
        return Disk(point, filesystem, "container layer")
    block = _block(root, number_, source)
    if block is None:
        return Disk(point, filesystem, "other", source)
    return Disk(point, filesystem, _kind(block), block.name, text(block / "device/model"), _link(block))


def _mount_of(path: Path, mountinfo: str) -> tuple[str, str, str, str] | None:
    """Mount point, device number, filesystem and source of the last mount that holds `path`."""
    best = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path.is_relative_to(point) and (best is None or len(point) >= len(best[0])):
            best = point, fields[2], rest[0], rest[1]
    return best


def _block(root: Path, number_: str, source: str) -> Path | None:
    """The folder of the whole drive below ``/sys/devices``; the first one under LVM or encryption."""
    block = root / "sys/dev/block" / number_
    if not block.exists():  # a filesystem with a device number of its own, as btrfs
        block = root / "sys/class/block" / source.rpartition("/")[2]
    if not block.exists():
        return None
    block = block.resolve()
    while slaves := sorted((block / "slaves").glob("*")):
        block = slaves[0].resolve()
    return block.parent if (block / "partition").exists() else block


def _kind(block: Path) -> str:
    for pattern, kind in (
        (r"nvme", "nvme"),
        (r"mmcblk", "memory card or eMMC"),
        (r"vd|xvd", "virtual"),
    ):
        if re.match(pattern, block.name):
            return kind
    if number(block / "queue/rotational"):
        return "rotating"
    return "ufs or sata" if block.name.startswith("sd") else "other"


def _link(block: Path) -> PcieLink | None:
    """The link of the PCIe device nearest to the drive."""
    for folder in block.parents:
        values = [text(folder / f"{when}_link_{what}") for when in ("current", "max") for what in ("speed", "width")]
        if values[0] is not None:
            numbers = [re.match(r"\d+(\.\d+)?", value or "") for value in values]
            if not all(numbers):
                return None
            speed, width, max_speed, max_width = (float(match[0]) for match in numbers if match)
            return PcieLink(speed, int(width), max_speed, int(max_width)) if speed and width else None
    return None


def _bytes_per_s(speed: float, width: int) -> float:
    coding = _OLD_CODING if speed <= _OLD_CODING_GT else _NEW_CODING
    return speed * 1e9 * coding / 8 * width
