"""Container engines: docker, or buildah, which needs no daemon."""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.jetson.pins import ARCHITECTURE
from remoe_edge.progress import Report, silent
from remoe_edge.sizes import format_size

ENGINES = ("docker", "buildah")

_OWN_LINE = re.compile(r"^(?:#\d+ [\d.]+ )?remoe-edge: (.+)$", re.MULTILINE)
_STEP = re.compile(r"^\[(\d+)/(\d+)\] STEP (\d+)/(\d+): (.*)")  # buildah
_PART = re.compile(r"^#\d+ \[([^\]]*\d+/\d+)\] (.*)")  # BuildKit
_NO_BUILDX = re.compile(r"unknown command: docker buildx|'buildx' is not a docker command|unknown flag: --load")
_NO_SPACE = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_NO_EMULATION = re.compile(r"exec format error", re.IGNORECASE)
_NO_IMAGE = re.compile(
    r"manifest unknown|image not known|failed to resolve source metadata|no such host|"
    r"failed to resolve reference|pinging container registry|short-name",
    re.IGNORECASE,
)
_EMULATION = (
    "this machine cannot run aarch64 programs, which installing packages into the image needs; on Debian and Ubuntu: "
    "sudo apt install qemu-user-static binfmt-support"
)
BINFMT = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True)
class Engine:
    """An engine, and its program. Where it keeps images is its own configuration's choice."""

    name: str
    program: str

    def command(self, *arguments: str) -> list[str]:
        return [self.program, *arguments]

    def ask(self, *arguments: str) -> str:
        """Stdout of a subcommand. Raises RemoeError with what it said if it fails."""
        return _ask(self.command(*arguments))

    def storage(self) -> Path:
        """Where it keeps images."""
        if self.name == "docker":
            return Path(self.ask("info", "--format", "{{.DockerRootDir}}").strip())
        return Path(json.loads(self.ask("info"))["store"]["GraphRoot"])

    def exists(self, image: str) -> bool:
        """Whether it has an image."""
        command = self.command(
            *(("image", "inspect") if self.name == "docker" else ("inspect", "--type", "image")), image
        )
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    def architecture(self, image: str) -> str:
        """Of an image, as images name it ("arm64")."""
        if self.name == "docker":
            return self.ask("image", "inspect", "--format", "{{.Architecture}}", image).strip()
        found: str = json.loads(self.ask("inspect", "--type", "image", image))["OCIv1"]["architecture"]
        return found

    def size(self, image: str) -> int:
        """Bytes of an image, unpacked."""
        if self.name == "docker":
            return int(self.ask("image", "inspect", "--format", "{{.Size}}", image))
        (container,) = self.ask("from", "--pull-never", image).split()
        try:
            folder = Path(self.ask("mount", container).strip())
            return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        finally:
            self.ask("rm", container)

    def read(self, image: str, path: str) -> bytes:
        """A file in an image."""
        if self.name == "docker":
            container = self.ask("create", image).strip()
            try:
                copied = subprocess.run(
                    self.command("cp", f"{container}:{path}", "-"), capture_output=True, check=False
                )
                if copied.returncode != 0:
                    raise RemoeError(f"{image} has no {path}: {copied.stderr.decode(errors='replace').strip()}")
                return _only_file(copied.stdout)
            finally:
                self.ask("rm", container)
        (container,) = self.ask("from", "--pull-never", image).split()
        try:
            return Path(self.ask("mount", container).strip(), path.lstrip("/")).read_bytes()
        finally:
            self.ask("rm", container)


def find_engine(name: str | None = None) -> Engine:
    """The engine with a name, else the first that answers. Raises RemoeError, with what to do, if there is none."""
    problems = []
    for each in [name] if name else ENGINES:
        program = shutil.which(each)
        if program is None:
            problems.append(f"{each} is not installed")
            continue
        question = ("version", "--format", "{{.Server.Version}}") if each == "docker" else ("info",)
        result = subprocess.run([program, *question], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode == 0:
            return Engine(each, program)
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        if each == "docker":
            reason = f"its daemon does not answer ({reason.removeprefix('Error: ')}; try: sudo systemctl start docker)"
        problems.append(f"{each} does not work: {reason}")
    raise RemoeError(
        f"no container engine: {'; '.join(problems)}. Install one (sudo apt install docker.io docker-buildx, or sudo "
        "apt install buildah), or make a tarball without containers: remoe-edge build --target jetson"
    )


def check_emulation(engine: Engine, binfmt: Path = BINFMT) -> None:
    """Raise RemoeError if steps of an aarch64 image cannot run here.

    Docker is not asked: it may run in a machine of its own.
    """
    if platform.machine() == ARCHITECTURE or engine.name == "docker":
        return
    if not (binfmt / "qemu-aarch64").exists():
        raise RemoeError(
            f"{_EMULATION} (if that alone does not help: sudo mount -t binfmt_misc binfmt_misc {binfmt} && sudo "
            "update-binfmts --enable qemu-aarch64)"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise RemoeError if a folder's drive has less than ``needed`` bytes left."""
    at = folder
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise RemoeError(
            f"{folder} has {format_size(free)} free, but {what} needs about {format_size(needed)}; free some there"
        )


def run_build(engine: Engine, arguments: Sequence[str], log: Path, report: Report = silent) -> None:
    """Run an engine's build with its output in ``log``, following its steps.

    Raises RemoeError with the one reason if it fails, where that is known, else with the end of its output.
    """
    with (
        log.open("w") as output,
        subprocess.Popen(
            engine.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                _follow(line, report)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise RemoeError(explain(log.read_text(), engine, log))


def _follow(line: str, report: Report) -> None:
    if step := _STEP.match(line):
        stage, stages, done, total = (int(each) for each in step.groups()[:4])
        report("Building the image", (stage - 1 + (done - 1) / total) / stages)
    elif part := _PART.match(line):
        # Stages run side by side.
        report(f"Building the image: {part[1]} {part[2][:40]}", None)


def explain(output: str, engine: Engine, log: Path) -> str:
    """One sentence for why a build failed."""
    own = _OWN_LINE.findall(output)
    if own:
        return str(own[-1])
    if _NO_BUILDX.search(output):
        return "docker has no buildx, which images for another architecture need: sudo apt install docker-buildx"
    if _NO_SPACE.search(output):
        prune = "docker system prune" if engine.name == "docker" else "buildah rmi --prune"
        return f"no space left in {engine.name}'s storage; free some with: {prune}"
    if _NO_EMULATION.search(output):
        return _EMULATION
    if _NO_IMAGE.search(output):
        line = [line for line in output.splitlines() if _NO_IMAGE.search(line)][-1]
        reason = line.strip().removeprefix("Error: ")
        return f"a base image cannot be had ({reason}); name another with --runtime-image or --build-image"
    end = "\n".join(output.splitlines()[-15:])
    return f"{engine.name} failed; all of its output is in {log}\n{end}"


def _ask(command: Sequence[str]) -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        raise RemoeError(f"{' '.join(command[:3])} failed: {result.stderr.strip()}")
    return result.stdout


def _only_file(archive: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.next()
        file = tar.extractfile(member) if member else None
        return file.read() if file else b""
