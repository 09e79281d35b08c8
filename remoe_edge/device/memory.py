"""Who holds the memory of this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.device.sysfs import text

# Debug file of the Jetson's memory manager: what the GPU holds, which no process's own count shows. Root only.
_NVMAP = "sys/kernel/debug/nvmap/iovmm/clients"


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


def _gpu(root: Path) -> dict[int, int]:
    rows = re.findall(r"^\S+\s+\S+\s+(\d+)\s+(\d+)K\b", text(root / _NVMAP) or "", re.MULTILINE)
    return {int(pid): int(size) * 1024 for pid, size in rows}
