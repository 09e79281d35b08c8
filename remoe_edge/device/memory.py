"""Who holds the memory of this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.device.sysfs import number, text

# Debug file of the Jetson's memory manager: what the GPU holds, which no process's own count shows. Root only.
_NVMAP = "sys/kernel/debug/nvmap/iovmm/clients"

_V1 = "memory.limit_in_bytes", ("total_rss", "total_shmem")


@dataclass(frozen=True)
class Holder:
    """A process; anonymous and shared bytes of its own, and what it holds through the GPU's driver."""

    pid: int
    name: str
    memory_bytes: int
    gpu_bytes: int = 0

    @property
    def total(self) -> int:
        return self.memory_bytes + self.gpu_bytes


def holders(root: Path = Path("/")) -> list[Holder]:
    """All processes that can be seen, the largest first. Page cache, which can be dropped, does not count."""
    gpu = _gpu(root)
    found = []
    for folder in (root / "proc").glob("[0-9]*"):
        status = text(folder / "status") or ""
        sizes = dict(re.findall(r"^(RssAnon|RssShmem):\s+(\d+) kB", status, re.MULTILINE))
        if sizes and int(folder.name) != os.getpid():
            name = re.search(r"^Name:\s+(.+)$", status, re.MULTILINE)
            held = sum(int(size) for size in sizes.values()) * 1024
            found.append(Holder(int(folder.name), name[1] if name else "?", held, gpu.get(int(folder.name), 0)))
    return sorted(found, key=lambda holder: -holder.total)


def available(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the least of what the machine and the memory cgroups above it leave.

    Page cache can be dropped, so of a group only anonymous and shared memory counts as taken. As in
    memory_available of llama-experts.cpp.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text(root / "proc/meminfo") or "", re.MULTILINE)
    least = int(found[1]) * 1024 if found else 0
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        limit_name, kinds = ("memory.max", ("anon", "shmem")) if not controllers else _V1
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            limit = number(group / limit_name)
            if limit is not None:
                stat = dict(re.findall(r"^(\w+) (\d+)$", text(group / "memory.stat") or "", re.MULTILINE))
                least = min(least, max(0, limit - sum(int(stat.get(kind, 0)) for kind in kinds)))
    return least


def _gpu(root: Path) -> dict[int, int]:
    rows = re.findall(r"^\S+\s+\S+\s+(\d+)\s+(\d+)K\b", text(root / _NVMAP) or "", re.MULTILINE)
    return {int(pid): int(size) * 1024 for pid, size in rows}
