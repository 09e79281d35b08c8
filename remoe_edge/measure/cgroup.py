"""A memory limit around a child process, and what it takes of it, for control groups of version 1 and 2.

A group is made below the one this process is in, or, where version 2 allows no processes beside child groups, next to
it. The child joins it before it becomes the program to run, so that all of the program's memory counts.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError

_PREFIX = "remoe-edge-"
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


class CgroupUnavailableError(RemoeError):
    """No memory group can be made here; the text says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """An existing control group. `version` is 1 or 2."""

    path: Path
    version: int

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, run inside the group: a shell joins it and then becomes the program."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def memory(self) -> int:
        """Anonymous and shared bytes in use; page cache, which can be dropped at any time, does not count."""
        names = ("total_rss", "total_shmem") if self.version == 1 else ("anon", "shmem")
        values = _counters(self.path / "memory.stat")
        return sum(values.get(name, 0) for name in names)

    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed because the limit was reached."""
        return _counters(self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).get(
            "oom_kill", 0
        )


@contextmanager
def memory_group(
    limit: int | None, *, cgroups: Path = _CGROUPS, own_groups: Path = _OWN_GROUPS
) -> Iterator[MemoryGroup]:
    """A new group, limited to `limit` bytes without swap; removed when the context ends.

    The limit counts page cache, too, as the kernel does. Processes must have left the group by the end of the context.
    `cgroups` is where control groups are mounted, `own_groups` the list of those this process is in. Raises
    CgroupUnavailableError where no group can be made, or one cannot be limited.
    """
    group = _make(_candidates(cgroups, own_groups))
    try:
        if limit is not None:
            _limit(group, limit)
        yield group
    finally:
        _remove(group.path)


def _candidates(cgroups: Path, own_groups: Path) -> list[tuple[Path, int]]:
    """Groups that may become the parent, best first, with their versions."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError as error:
        raise CgroupUnavailableError(f"{own_groups}: cannot be read: {error.strerror}") from error
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, path in own.items():
        if "memory" in controllers.split(","):
            mount = cgroups / "memory"
            # Inside a container the path may be the host's, while the mount shows the container's own group as root.
            return [(parent, 1) for parent in (mount / path.lstrip("/"), mount) if parent.is_dir()][:1]
    parents = []
    if "" in own and (cgroups / "cgroup.controllers").exists():
        parent = cgroups / own[""].lstrip("/")
        parent = parent if parent.is_dir() else cgroups
        parents = [folder for folder in (parent, *parent.parents) if folder.is_relative_to(cgroups)]
    return [(parent, 2) for parent in parents if _hands_on_memory(parent)]


def _hands_on_memory(parent: Path) -> bool:
    """Whether child groups of a version 2 group have limits on memory, after asking for it."""
    control = parent / "cgroup.subtree_control"
    with suppress(OSError):
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
        return "memory" in control.read_text().split()
    return False


def _make(candidates: list[tuple[Path, int]]) -> MemoryGroup:
    reason = "no group that this process is in hands on the memory controller"
    for parent, version in candidates:
        _remove_abandoned(parent)
        path = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            path.mkdir()
        except OSError as error:
            reason = f"{parent}: {error.strerror}"
            continue
        if os.access(path / "cgroup.procs", os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK):
            return MemoryGroup(path, version)
        reason = f"{parent}: processes may not be moved here"
        path.rmdir()
    raise CgroupUnavailableError(f"a memory limit is not possible: {reason}; run as root, or with systemd-run --user")


def _limit(group: MemoryGroup, limit: int) -> None:
    files = {
        1: {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit},
        2: {"memory.max": limit, "memory.swap.max": 0},
    }
    for name, value in files[group.version].items():
        path = group.path / name
        # Without swap accounting the second file is not there.
        if not path.exists() and "sw" in name:
            continue
        try:
            path.write_text(str(value))
        except OSError as error:
            raise CgroupUnavailableError(f"a memory limit is not possible: {path}: {error.strerror}") from error


def _remove(path: Path) -> None:
    """Remove a group whose processes have ended; the kernel may take a moment to see that."""
    for _ in range(100):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.02)
        else:
            return


def _remove_abandoned(parent: Path) -> None:
    """Remove groups that a killed process of ours left behind; those still in use refuse."""
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            with suppress(OSError):
                path.rmdir()


def _counters(path: Path) -> dict[str, int]:
    """A file of lines "name number"."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
