"""Output files appear whole or not at all: whatever call a command is killed at, and whichever fails.

Every change that a command makes to its folder is a place to kill it (before the call, or in the middle of a write) and
to let it fail (a full disk from there on, a drive that fails). Tried are the first and the last call of each kind for
each file, and of those a part where a run takes long; every call with REMOE_EVERY_FAULT=1, every third from the second
on with REMOE_EVERY_FAULT=2/3. What was tried is printed (pytest -s).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf_maker as make
import pytest
from faulty import COUNT, FAILING, FULL, KILL, ONCE, TEAR, Ended, Zygote, content, refill, worth_trying, zygote
from small_twin import small_trace, write_small_twin

from remoe_edge.routing.trace import Trace, save_trace

_GIVEN = re.fullmatch(r"(\d+)(?:/(\d+))?", os.environ.get("REMOE_EVERY_FAULT", ""))
EVERY = slice(int(_GIVEN[1]) - 1, None, int(_GIVEN[2] or 1)) if _GIVEN else None
NOBODY = 65534
_PLACES = 2
OLD = b"an older output, whole"

TUNE = ["--length", "24", "--steps", "2", "--micro-batch", "2", "--accumulation", "1", "--held-out", "2"]
TUNE += ["--lr", "0.01", "--warm-up", "1", "--local-warm-up", "1", "--check-every", "1", "--max-ppl-increase", "1"]


@dataclass(frozen=True)
class Scenario:
    """A command, run in the folder that is watched.

    Attributes
    ----------
    outputs
        Files that must have the same bytes, kill or no kill.
    lines
        Files of JSON lines with times in them: all lines whole.
    work
        Files that a killed run may leave for the next one.
    resume
        What is added to the command when its journal is there.
    """

    name: str
    arguments: list[str]
    outputs: tuple[str, ...]
    lines: tuple[str, ...] = ()
    work: tuple[str, ...] = ()
    journal: str | None = None
    resume: list[str] = field(default_factory=list)
    call: str = ""
    torch: bool = False
    has_force: bool = True

    @property
    def final(self) -> set[str]:
        return {*self.outputs, *self.lines}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make.write_base(folder / "base.gguf")
    make.write_base(folder / "parts.gguf", tensors_per_part=4)
    make.write_router(folder / "router.safetensors", make.router_values())
    trace = small_trace()
    save_trace(Trace(trace.ids[:16], trace.offs * 0 + [0, 16], trace.meta), folder / "trace.npz")
    write_small_twin(folder / "twin.gguf")
    (folder / "text.txt").write_text("The router of a model chooses a few experts for each token. " * 30)
    return folder


@pytest.fixture(scope="module")
def checkpoint(inputs: Path) -> Path:
    pytest.importorskip("torch")
    from tiny_hf import tiny_model

    return tiny_model("olmoe", inputs / "olmoe")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    modules = ("convert", "twin", "bench", "trace")
    names = ["recorded_bench", *(f"remoe_edge.commands.{name}" for name in modules)]
    with zygote(tmp_path_factory.mktemp("plain"), *names) as process:
        yield process


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Zygote]:
    modules = ("tuning.train", "tuning.export", "tuning.hf_trace", "commands.tune", "commands.trace")
    names = [f"remoe_edge.{name}" for name in modules]
    with zygote(tmp_path_factory.mktemp("torch"), "transformers.models.olmoe.modeling_olmoe", *names) as process:
        yield process


def scenario(name: str, inputs: Path) -> Scenario:
    of = {path.name: str(path) for path in inputs.iterdir()}
    return {
        "convert": lambda: Scenario(
            name, ["convert", of["base.gguf"], of["router.safetensors"], "-o", "out.gguf"], ("out.gguf",)
        ),
        "convert, parts": lambda: Scenario(
            name,
            ["convert", str(min(inputs.glob("parts-00001*"))), of["router.safetensors"], "-o", "out.gguf"],
            tuple(f"out-{i:05d}-of-00003.gguf" for i in (1, 2, 3)),
        ),
        "twin": lambda: Scenario(
            name, ["twin", of["trace.npz"], "--hidden", "64", "--ff", "32", "-o", "out.gguf"], ("out.gguf",)
        ),
        "bench": lambda: Scenario(
            name,
            [of["twin.gguf"], "--budget", "2s", "--baseline", "mmap", "-r", "2", "-n", "5", "-o", "out.jsonl"],
            (),
            lines=("out.jsonl",),
            work=("out.jsonl.partial",),
            journal="out.jsonl.partial",
            resume=["--resume"],
            call="recorded_bench:run",
        ),
        "tune": lambda: Scenario(
            name,
            ["tune", of["olmoe"], "--data", of["text.txt"], "-o", "out.safetensors", "--export-hf", "tuned", *TUNE],
            ("out.safetensors", "out.md", *(f"tuned/{p.name}" for p in (inputs / "olmoe").iterdir())),
            lines=("out.safetensors.work/log.jsonl",),
            work=("out.safetensors.work/", "out.safetensors.work/tune-checkpoint.safetensors", "tuned/remoe-edge.md"),
            torch=True,
            has_force=False,
        ),
        "trace": lambda: Scenario(
            name, ["trace", of["olmoe"], "-p", "experts", "-n", "3", "-o", "out.npz"], ("out.npz",), torch=True
        ),
    }[name]()


NAMES = [
    "convert",
    "convert, parts",
    "twin",
    "bench",
    # The processes that import torch.
    *(pytest.param(name, marks=pytest.mark.filterwarnings("default")) for name in ("tune", "trace")),
]


@dataclass
class Bench:
    """A scenario, the process that runs it, and what it does undisturbed."""

    scenario: Scenario
    zygote: Zygote
    folder: Path

    def __post_init__(self) -> None:
        refill(self.folder, {})
        done = self.run()
        assert done.status == 0, done.text
        self.calls = done.calls
        self.whole = content(self.folder)
        assert set(self.whole) >= {*self.scenario.final, "tmp/"}

    def run(self, *more: str, nth: int = 0, action: int = COUNT, user: int | None = None) -> Ended:
        given = self.scenario
        return self.zygote.run(self.folder, *given.arguments, *more, nth=nth, action=action, call=given.call, user=user)

    def places(self, part: int = 0) -> list[int]:
        """Numbers of the calls to try."""
        found = worth_trying(self.calls, EVERY is not None)
        if EVERY:
            found = found[EVERY]
        elif self.scenario.torch:
            found = found[part :: len(found) // _PLACES]
        print(f"{self.scenario.name}: {len(found)} of {len(self.calls)} calls")
        return found

    def check_whole(self, where: str, old: dict[str, bytes] | None = None) -> None:
        """Outputs are there as they must be, or not there, or as they were."""
        for name, data in content(self.folder).items():
            if name in self.scenario.outputs:
                assert data in (self.whole[name], (old or {}).get(name)), f"{where}: {name} is not whole"

    def check_done(self, where: str) -> None:
        """All is there as if nothing had happened, and nothing else is."""
        found = content(self.folder)
        assert found.keys() == self.whole.keys(), where
        for name in self.scenario.outputs:
            assert found[name] == self.whole[name], f"{where}: {name}"
        for name in self.scenario.lines:
            rows, expected = ([json.loads(line) for line in each[name].splitlines()] for each in (found, self.whole))
            assert [row.keys() for row in rows] == [row.keys() for row in expected], f"{where}: {name}"


@pytest.fixture
def bench(request: pytest.FixtureRequest, inputs: Path, tmp_path: Path) -> Callable[[str], Bench]:
    def make_bench(name: str) -> Bench:
        if name in ("tune", "trace"):
            request.getfixturevalue("checkpoint")
        given = scenario(name, inputs)
        process = request.getfixturevalue("with_torch" if given.torch else "plain")
        return Bench(given, process, tmp_path / "watched")

    return make_bench


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_call_it_leaves_whole_outputs_and_the_next_run_succeeds(
    bench: Callable[[str], Bench], name: str
) -> None:
    tried = bench(name)
    given = tried.scenario
    for nth in tried.places():
        for action in (KILL, TEAR) if re.search("write|copy|send", tried.calls[nth - 1][0]) else (KILL,):
            where = f"{'killed' if action == KILL else 'torn'} at call {nth}, {tried.calls[nth - 1]}"
            refill(tried.folder, {})
            assert tried.run(nth=nth, action=action).status == -signal.SIGKILL, where
            tried.check_whole(where)
            there = content(tried.folder).keys() & given.final
            again = tried.run(*(given.resume if given.journal in content(tried.folder) else []))
            if again.status == 0:
                tried.check_done(where)
                continue
            # There is an output already: all of it, or for parts those that the first one does not open yet.
            assert "exists; pass --force" in again.text, (where, again.text)
            assert there, where
            if there == given.final:
                tried.check_done(where)
            else:
                assert min(given.outputs) not in there, where
                assert tried.run("--force").status == 0
                tried.check_done(where)


@pytest.mark.parametrize("name", ["convert", "convert, parts", "twin", "trace"])
@pytest.mark.filterwarnings("default")
def test_killed_while_it_overwrites_it_leaves_the_old_or_the_new_output(
    bench: Callable[[str], Bench], name: str
) -> None:
    tried = bench(name)
    old = dict.fromkeys(tried.scenario.outputs, OLD)
    first = min(old)
    refill(tried.folder, old)
    tried.calls = tried.run("--force").calls
    for nth in tried.places(1):
        where = f"killed at call {nth}, {tried.calls[nth - 1]}"
        refill(tried.folder, old)
        assert tried.run("--force", nth=nth, action=KILL).status == -signal.SIGKILL
        tried.check_whole(where, old)
        found = content(tried.folder)
        if first in found:
            # What opens a model of several parts is as old as all others.
            assert {found[output] == OLD for output in old} == {found[first] == OLD}, where
        assert tried.run("--force").status == 0
        tried.check_done(where)


@pytest.mark.parametrize("action", [FULL, FAILING, FAILING + ONCE], ids=["full", "failing", "once"])
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fails_is_named_and_costs_nothing(bench: Callable[[str], Bench], name: str, action: int) -> None:
    tried = bench(name)
    given = tried.scenario
    old = dict.fromkeys(given.outputs, OLD) if given.has_force and not given.call else {}
    force = ["--force"] if old else []
    refill(tried.folder, old)
    tried.calls = tried.run(*force).calls
    for nth in tried.places({FULL: 2, FAILING: 3}.get(action, 4)):
        where = f"failed at call {nth}, {tried.calls[nth - 1]}"
        refill(tried.folder, old)
        done = tried.run(*force, nth=nth, action=action)
        assert "Traceback" not in done.text, (where, done.text)
        if done.status == 0:
            # Nothing that was still to do needed the disk.
            tried.check_done(where)
            continue
        assert done.status == 1, (where, done.text)
        said = done.text[done.text.index("Error: ") :]
        assert re.search(r"No space left|Input/output error", said), (where, said)
        assert "out" in said or "tuned" in said, (where, said)
        tried.check_whole(where, old)
        found = content(tried.folder)
        if action == FULL:
            # Room can be made again at once, so nothing temporary may stay.
            assert not [key for key in found if "tmp" in key and key != "tmp/"], where
        again = tried.run(*force, *(given.resume if given.journal in found else []))
        if again.status:
            assert "exists" in again.text, (where, again.text)
            assert found.keys() >= given.final, where
        tried.check_done(where)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_may_not_be_written_is_refused_at_once(
    bench: Callable[[str], Bench], inputs: Path, name: str
) -> None:
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    tried = bench(name)
    refill(tried.folder, {"tmp/": b""}).chmod(0o555)
    for path in [inputs, *inputs.parents]:
        if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o055)
    done = tried.run(user=NOBODY)
    assert (done.status, done.calls) == (1, []), done.text
    assert re.search(r"Error: out\S*: no file can be made in \S+ by this user; choose another folder", done.text)
    assert content(tried.folder) == {"tmp/": b""}


IN_A_SMALL_DISK = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
folder, options, *command = sys.argv[1:]
if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # own mounts, private
    sys.exit(77)
flags = 1 if options == "ro" else 0
if libc.mount(b"none", folder.encode(), b"tmpfs", flags, None if flags else options.encode()):
    sys.exit(77)
done = subprocess.run([sys.executable, "-m", "remoe_edge", *command], cwd=folder, capture_output=True, text=True)
print(done.stderr, sorted(os.listdir(folder)))
sys.exit(done.returncode)
"""


@pytest.mark.parametrize(
    ("options", "reason"), [("size=8k", "No space left on device; free some space"), ("ro", "no file can be made in")]
)
@pytest.mark.parametrize("name", ["convert", "twin"])
def test_a_real_disk_that_is_full_or_read_only(
    inputs: Path, tmp_path: Path, name: str, options: str, reason: str
) -> None:
    arguments = scenario(name, inputs).arguments
    command = [sys.executable, "-c", IN_A_SMALL_DISK, str(tmp_path), options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 77:
        pytest.skip("mounting needs root")
    # Both look at what is free before they write.
    assert done.returncode == 1
    assert re.search(rf"Error: .*({reason}|has \S+ \S+ free)", done.stdout), done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_an_output_on_another_filesystem_than_its_inputs_and_temporary_files(inputs: Path, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem")
    made = []
    folder = refill(shared / f"remoe-edge-test-{os.getpid()}", {})
    try:
        for where in (folder, tmp_path):
            output = where / "out.gguf"
            arguments = scenario("convert", inputs).arguments[:-1]
            command = [sys.executable, "-m", "remoe_edge", *arguments, str(output)]
            subprocess.run(command, check=True, timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)})
            made.append(output.read_bytes())
            assert os.listdir(where) == ["out.gguf"]
    finally:
        refill(folder, {}).rmdir()
    assert made[0] == made[1]


def test_every_output_is_flushed_before_it_gets_its_name(bench: Callable[[str], Bench]) -> None:
    """What a power cut may take: a name may not be on disk before its bytes are, and no byte is written after that."""
    for name in ("convert", "convert, parts", "twin", "bench"):
        calls = bench(name).calls
        for at, (call, path) in enumerate(calls):
            if call != "rename":
                continue
            earlier = [c for c, p in calls[:at] if p.name.startswith(f".{path.name}.tmp-")]
            assert earlier[-1] == "fsync", (name, path, earlier)
            assert ("fsync", path.parent) in calls[at:], (name, path)
