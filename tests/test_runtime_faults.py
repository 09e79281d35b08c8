"""Reads that fail in the runtime as it is installed: by a preloaded library, and by what happens to the file."""

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llama_tools import completion
from reads_under_faults import CONTROL, KINDS, Faults
from tiny_models import write_tiny_model

import remoe_edge
from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.runtime.llama import CacheConfig, RuntimeReadError, Session, load_model, open_model

pytestmark = pytest.mark.runtime

HERE = Path(__file__).parent
# linux/fs/ext4/ext4.h
EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_FLUSH = 2
STEPS = [[token] for token in range(10, 26)]


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("preload") / "faulty_reads.so"
    compiler = os.environ.get("CC", "cc")
    source = HERE / "faulty_reads.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", "qwen3moe", quant="Q4_0", n_expert=8, k=2, n_layer=2, seed=3)


def logits(session: Session, steps: list[list[int]] = STEPS) -> bytes:
    session.clear()
    for tokens in steps:
        session.decode(tokens)
    return session.logits().tobytes()


def resident_logits(model: Path) -> bytes:
    with open_model(model, n_ctx=64, n_threads=1, mmap=False, repack=False) as session:
        return logits(session)


@pytest.mark.parametrize("io", ["direct", "mmap"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_read_fails_in_turn(model: Path, tmp_path: Path, preload: Path, io: str, phase: str) -> None:
    control = tmp_path / "control"
    control.write_bytes(bytes(CONTROL.size))
    result = subprocess.run(
        [sys.executable, HERE / "reads_under_faults.py", model, control, io, phase],
        env={**os.environ, "LD_PRELOAD": str(preload), "FAULTY_READS": str(control)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout.splitlines()[-1])
    print(done)
    assert set(done["tried"]) == set(KINDS)
    # Two layers, three tensors, at least two experts that are not there; once and for good.
    assert min(done["tried"].values()) >= 24
    for kind in ("EIO", "ENOMEM", "zero"):
        assert done["errors"][kind] == done["tried"][kind]
    for kind in ("EINTR", "wrong"):
        assert 0 < done["errors"][kind] < done["tried"][kind]
    assert done["errors"]["slow"] == 0


def test_a_device_is_removed_and_comes_back(model: Path, tmp_path: Path, preload: Path) -> None:
    """Nothing can be read for several requests of two contexts; then everything can."""
    control = tmp_path / "control"
    control.write_bytes(bytes(CONTROL.size))
    code = """
import sys
from pathlib import Path
from reads_under_faults import Faults, check_error, failed_request, request
from remoe_edge.runtime.llama import CacheConfig, load_model
model, control = map(Path, sys.argv[1:])
faults = Faults(control, model)
with load_model(model, CacheConfig("3s"), repack=False) as loaded, loaded.session(n_ctx=64, n_threads=1) as first:
    expected = [request(first, phase) for phase in ("decode", "prefill")]
    with loaded.session(n_ctx=64, n_threads=1) as second:
        faults.arm("EIO", 0, True)
        for _ in range(3):
            for context in (first, second):
                for phase in ("decode", "prefill"):
                    assert "Input/output error" in failed_request(context, phase)
        faults.clear()
        assert [request(second, phase) for phase in ("decode", "prefill")] == expected
    assert [request(first, phase) for phase in ("decode", "prefill")] == expected
    # A cable is pulled in the middle of a request, and stays out while the model is unloaded.
    faults.arm("EIO", 7, True)
    assert failed_request(first, "prefill")
print("lives")
"""
    result = subprocess.run(
        [sys.executable, "-c", code, model, control],
        env={
            **os.environ,
            "LD_PRELOAD": str(preload),
            "FAULTY_READS": str(control),
            "PYTHONPATH": str(HERE),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "lives\n"), result.stderr


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, on a block device of its own."""
    image, folder = tmp_path / "drive.img", tmp_path / "drive"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.ext4"), reason="needs root and e2fsprogs")
@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_a_drive_that_is_gone(drive: Path, model: Path, io: str) -> None:
    """The kernel ends a mounted file system, as it does when its device has gone: what is open fails from then on."""
    expected = resident_logits(model)
    path = Path(shutil.copy(model, drive))
    os.sync()
    with open_model(path, CacheConfig("2s", io=io), n_ctx=64, n_threads=1, repack=False) as session:
        info = session.info()
        assert info is not None
        assert info.io == io
        assert logits(session) == expected
        folder = os.open(drive, os.O_RDONLY)
        fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        os.close(folder)
        for _ in range(3):
            with pytest.raises(
                RuntimeReadError, match=r"tiny\.gguf: .* expert \d+, offset \d+, \d+ bytes: Input/output"
            ):
                logits(session)
        assert session.stats() is not None
    with pytest.raises(RemoeError), open_model(path, CacheConfig("2s"), n_ctx=64, n_threads=1):
        pass
    image = drive.with_suffix(".img")
    subprocess.run(["umount", drive], check=True)
    subprocess.run(["mount", "-o", "loop", image, drive], check=True)
    with open_model(path, CacheConfig("2s", io=io), n_ctx=64, n_threads=1, repack=False) as session:
        assert logits(session) == expected


class TestFiles:
    @pytest.mark.parametrize("io", ["direct", "mmap"])
    def test_no_page_of_the_file_is_mapped(self, model: Path, io: str) -> None:
        """What is not mapped cannot vanish: a truncated file is an error of read, in a process that could be killed."""
        code = """
import os, sys
from pathlib import Path
from remoe_edge.runtime.llama import CacheConfig, RuntimeReadError, open_model
model, io = Path(sys.argv[1]), sys.argv[2]
with open_model(model, CacheConfig("2s", io=io), n_ctx=64, n_threads=1) as session:
    session.decode([10])
    assert session.info().io == io
    assert str(model) not in Path("/proc/self/maps").read_text()
    os.truncate(model, 0)
    try:
        session.decode([20, 30, 40, 50])
    except RuntimeReadError as error:
        print(error)
"""
        result = subprocess.run(
            [sys.executable, "-c", code, model, io], capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode != -signal.SIGBUS
        assert result.returncode == 0, result.stderr
        assert "the file ends after 0 of" in result.stdout

    def test_replaced_by_another(self, model: Path, tmp_path: Path) -> None:
        """A rename puts another file in its place: the open one goes on to be read."""
        other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", quant="Q4_0", n_expert=8, n_layer=2, seed=4)
        expected = resident_logits(model)
        with open_model(model, CacheConfig("2s"), n_ctx=64, n_threads=1, repack=False) as session:
            other.replace(model)
            assert logits(session) == expected
        assert resident_logits(model) != expected


class TestVerify:
    @pytest.mark.parametrize("repack", ["off", "on"])
    def test_a_file_that_is_overwritten(self, model: Path, tmp_path: Path, repack: str) -> None:
        other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", quant="Q4_0", n_expert=8, n_layer=2, seed=4)
        content = model.read_bytes()
        with open_model(
            model, CacheConfig("2s", verify=True, repack=repack), n_ctx=64, n_threads=1, repack=repack == "on"
        ) as session:
            info, stats = session.info(), session.stats()
            assert info is not None
            assert info.verify
            assert info.used <= info.budget
            assert stats is not None
            assert stats.reads == 0  # those of the checksums are no reads of a call
            expected = logits(session)
            with model.open("r+b") as file:
                file.write(other.read_bytes())
            assert model.stat().st_size == len(content)
            with pytest.raises(RuntimeReadError, match=r"expert \d+, offset \d+, \d+ bytes: the bytes are not those"):
                logits(session)
            stats = session.stats()
            assert stats is not None
            assert stats.reads_wrong >= 2
            with model.open("r+b") as file:
                file.write(content)
            assert logits(session) == expected

    def test_off_it_costs_nothing_and_sees_nothing(self, model: Path, tmp_path: Path) -> None:
        other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", quant="Q4_0", n_expert=8, n_layer=2, seed=4)
        with open_model(model, CacheConfig("2s"), n_ctx=64, n_threads=1, repack=False) as session:
            info = session.info()
            assert info is not None
            assert not info.verify
            floor = info.floor
            expected = logits(session)
            with model.open("r+b") as file:
                file.write(other.read_bytes())
            assert logits(session) != expected
        with load_model(model, CacheConfig("2s", verify=True)) as loaded:
            info = loaded.info()
        assert info is not None
        # 8 bytes for each of 8 experts of 3 tensors of 2 layers, and the table's own.
        assert 8 * 8 * 3 * 2 <= info.floor - floor < 1000

    def test_the_tools(self, model: Path) -> None:
        cache = ("--expert-cache", "2s")
        given = completion(model, *cache, "--expert-cache-verify")
        assert given.returncode == 0, given.stderr
        assert "plain kernels, reads verified" in given.stderr
        assert completion(model, *cache, env={"LLAMA_ARG_EXPERT_CACHE_VERIFY": "1"}).stdout == given.stdout
        alone = completion(model, "--expert-cache-verify")
        assert alone.returncode != 0
        assert "have no effect without --expert-cache" in alone.stderr + alone.stdout
        with pytest.raises(RemoeError, match="unknown value 'maybe' for verifying experts, use on or off"):
            remoe_edge.Llama(
                str(model), expert_cache="2s", kv_overrides={"expert_cache.verify": "maybe"}, verbose=False
            )

    def test_the_command(self, model: Path) -> None:
        common = ["run", str(model), "-p", "ab", "-n", "3", "--threads", "1"]
        given = CliRunner().invoke(cli, [*common, "--expert-cache", "2s", "--expert-cache-verify", "-v"])
        assert given.exit_code == 0, given.output
        without = CliRunner().invoke(cli, [*common, "--expert-cache", "off", "--expert-cache-verify"])
        assert without.exit_code == 2
        assert "--expert-cache-verify has no effect with --expert-cache off" in without.output
        assert ", verified," in given.output

    def test_a_benchmark_counts_wrong_reads(
        self, model: Path, tmp_path: Path, preload: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        control = tmp_path / "control"
        control.write_bytes(bytes(CONTROL.size))
        faults = Faults(control, model)
        # Of the processes that decode, not of this one, which measures the storage.
        monkeypatch.setenv("LD_PRELOAD", str(preload))
        monkeypatch.setenv("FAULTY_READS", str(control))

        def bench(*more: str) -> dict[str, Any]:
            common = [
                "bench",
                str(model),
                "--budget",
                "2s",
                "-p",
                "ab",
                "-n",
                "6",
                "-r",
                "1",
                "-t",
                "1",
                "--power",
                "none",
            ]
            done = CliRunner().invoke(cli, [*common, "--json", *more])
            assert done.exit_code == 0, done.output
            (row,) = json.loads(done.stdout)
            return dict(row)

        faults.arm("wrong", 1 << 30, False)
        good = bench("--expert-cache-verify")
        assert (good["verify"], good["reads_wrong"]) == (True, 0)
        faults.arm("wrong", faults.reads - 2, False)
        bad = bench("--expert-cache-verify")
        assert faults.fired == 1
        assert (bad["verify"], bad["reads_wrong"]) == (True, 1)
        assert bad["logits_sha256"] == good["logits_sha256"]
        faults.clear()
        without = bench()
        assert (without["verify"], without["reads_wrong"]) == (False, None)
        assert without["logits_sha256"] == good["logits_sha256"]
