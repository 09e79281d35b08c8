import os
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_edge.measure.cgroup import CgroupUnavailableError, MemoryGroup, memory_group
from remoe_edge.measure.pagecache import drop_page_cache

MIB = 1 << 20


def run_in(group: MemoryGroup, code: str) -> "subprocess.CompletedProcess[str]":
    command = group.command([sys.executable, "-c", code])
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def permitted() -> bool:
    """Whether groups can be made here, found out without the code under test."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    path = next((path for controllers, path in own.items() if "memory" in controllers.split(",")), None)
    if path is None:
        return os.geteuid() == 0 and "memory" in Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split()
    folder = Path("/sys/fs/cgroup/memory" + path)
    return os.access(folder if folder.is_dir() else Path("/sys/fs/cgroup/memory"), os.W_OK)


def test_a_limit_holds_or_is_refused_with_the_reason(permitted: bool) -> None:
    if not permitted:
        with pytest.raises(CgroupUnavailableError, match="a memory limit is not possible"), memory_group(64 * MIB):
            pass
        return
    with memory_group(64 * MIB) as group:
        small = run_in(group, "x = bytearray(20 << 20); print('done')")
        assert (small.returncode, small.stdout) == (0, "done\n")
        assert group.oom_kills() == 0
        large = run_in(group, "x = bytearray(200 << 20); print('done')")
        assert (large.returncode, large.stdout) == (-9, "")
        assert group.oom_kills() == 1
    assert not group.path.exists()


def test_page_cache_counts_against_the_limit_but_not_as_memory(permitted: bool, tmp_path: Path) -> None:
    if not permitted:
        return
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100 * MIB))
    drop_page_cache([path])
    code = f"data = open({str(path)!r}, 'rb')\nwhile data.read(1 << 20): pass\nprint('ready', flush=True)\ninput()"
    with (
        memory_group(64 * MIB) as group,
        subprocess.Popen(
            group.command([sys.executable, "-c", code]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert 1 * MIB < group.memory() < 40 * MIB
        process.communicate(b"\n")
        assert process.returncode == 0


def test_a_group_is_removed_when_an_exception_ends_the_context(permitted: bool) -> None:
    if not permitted:
        return
    seen = []

    def interrupted() -> None:
        with memory_group(64 * MIB) as group:
            seen.append(group.path)
            assert group.path.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].exists()


def test_groups_that_a_killed_process_left_are_removed(permitted: bool) -> None:
    if not permitted:
        return
    code = (
        "import os\nfrom remoe_edge.measure.cgroup import memory_group\n"
        "with memory_group(1 << 26) as group:\n    print(group.path, flush=True)\n    os.kill(os.getpid(), 9)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    left = Path(out.strip())
    assert left.is_dir()
    with memory_group(64 * MIB):
        assert not left.exists()


class FakeV2:
    """A folder like a version 2 hierarchy with one group, `inner`, that this process is in."""

    def __init__(self, root: Path, *, hands_on: bool) -> None:
        self.cgroups, self.own_groups = root / "cgroup", root / "own"
        self.inner = self.cgroups / "inner"
        self.inner.mkdir(parents=True)
        (self.cgroups / "cgroup.controllers").write_text("cpu memory\n")
        for folder in self.cgroups, self.inner:
            (folder / "cgroup.procs").touch()
        (self.cgroups / "cgroup.subtree_control").write_text("memory\n" if hands_on else "cpu\n")
        # Processes are in it, so the kernel lets it hand on nothing: reading finds nothing, and writing has no effect.
        (self.inner / "cgroup.subtree_control").symlink_to("/dev/null")
        self.own_groups.write_text("0::/inner\n")


def test_version_2_makes_the_group_next_to_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeV2(tmp_path, hands_on=True)
    make = Path.mkdir

    def mkdir_with_files(path: Path) -> None:
        make(path)
        (path / "cgroup.procs").touch()
        (path / "memory.stat").write_text("anon 3000\nfile 9999\nshmem 200\n")
        (path / "memory.events").write_text("max 4\noom 1\noom_kill 1\n")
        (path / "memory.swap.max").write_text("max\n")

    def rmdir_with_files(path: Path) -> None:
        written = {name: (path / name).read_text() for name in ("memory.max", "memory.swap.max")}
        assert written == {"memory.max": "4096", "memory.swap.max": "0"}
        for file in path.iterdir():
            file.unlink()
        os.rmdir(path)

    monkeypatch.setattr(Path, "mkdir", mkdir_with_files)
    monkeypatch.setattr(Path, "rmdir", rmdir_with_files)
    with memory_group(4096, cgroups=fake.cgroups, own_groups=fake.own_groups) as group:
        assert (group.version, group.path.parent) == (2, fake.cgroups)
        assert group.memory() == 3200
        assert group.oom_kills() == 1
        done = subprocess.run(group.command(["/bin/echo", "a b"]), capture_output=True, text=True, check=True)
        assert done.stdout == "a b\n"
        assert (group.path / "cgroup.procs").read_text().strip().isdecimal()
    assert not group.path.exists()


def test_version_2_without_the_memory_controller_is_refused(tmp_path: Path) -> None:
    fake = FakeV2(tmp_path, hands_on=False)
    (fake.cgroups / "cgroup.subtree_control").unlink()
    (fake.cgroups / "cgroup.subtree_control").symlink_to("/dev/null")
    with (
        pytest.raises(CgroupUnavailableError, match="hands on the memory controller"),
        memory_group(4096, cgroups=fake.cgroups, own_groups=fake.own_groups),
    ):
        pass


def test_a_system_without_control_groups_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CgroupUnavailableError, match="cannot be read"),
        memory_group(4096, cgroups=tmp_path, own_groups=tmp_path / "missing"),
    ):
        pass


def resident_share(path: Path) -> float:
    """The share of a file that a read finds in the page cache, judged by time being spent on storage or not."""
    before = Path("/proc/self/io").read_text()
    path.read_bytes()
    after = Path("/proc/self/io").read_text()
    read = [int(text.split("\nread_bytes: ")[1].split("\n")[0]) for text in (before, after)]
    return 1 - (read[1] - read[0]) / path.stat().st_size


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def test_dropping_the_page_cache_makes_the_next_read_a_read_of_the_disk(file_on_disk: Path) -> None:
    assert resident_share(file_on_disk) == 1
    state = drop_page_cache([file_on_disk])
    assert state in {"dropped", "file dropped"}
    assert resident_share(file_on_disk) < 0.1


def test_without_permission_only_the_file_is_dropped(file_on_disk: Path, tmp_path: Path) -> None:
    assert drop_page_cache([file_on_disk], control=tmp_path / "missing" / "drop_caches") == "file dropped"
    assert resident_share(file_on_disk) < 0.1


def test_a_page_cache_that_cannot_be_dropped_is_called_warm(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert drop_page_cache([missing], control=missing / "drop_caches") == "warm"
