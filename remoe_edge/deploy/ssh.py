"""Commands and files over SSH, by the system's ssh and rsync; its configuration, keys and known hosts apply."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remoe_edge.errors import RemoeError
from remoe_edge.progress import Report, silent

_CONNECT_S = 15
_STAGE = re.compile(r"(.+) (\d+) %")
_PROGRESS = re.compile(r"\s(\d+)%\s")


@dataclass(frozen=True)
class Host:
    """A machine to reach.

    Attributes
    ----------
    name
        As ssh takes it: a name of its configuration, or ``user@address``.
    """

    name: str
    port: int | None = None
    identity: Path | None = None
    config: Path | None = None
    options: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        # ssh and rsync would take the first for an option; rsync would take what is before a colon for a host.
        if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.@%:\[\]-]*", self.name):
            raise RemoeError(f"{self.name!r} is not a host; write for example jetson.local or user@192.168.1.20")

    def ssh(self) -> list[str]:
        """The program and its options, without the host."""
        command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "ServerAliveInterval=15"]
        command += ["-F", str(self.config)] if self.config else []
        command += ["-p", str(self.port)] if self.port else []
        command += ["-i", str(self.identity)] if self.identity else []
        return [*command, *self.options]

    def run(self, words: Sequence[str], follow: Report | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command there; its words reach it as they are, whatever is in them.

        Parameters
        ----------
        follow
            Told of the progress that a command of remoe-edge writes to stderr where that is no terminal.

        Raises RemoeError if the machine cannot be reached.
        """
        # sshd gives one string to the user's shell, so every word is quoted for it.
        command = [*self.ssh(), "--", self.name, shlex.join(words)]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as output,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True, errors="replace"
            ) as process,
        ):
            said = []
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    said.append(line)
                    if follow and (stage := _STAGE.fullmatch(line.strip())):
                        follow(f"{self.name}: {stage[1]}", int(stage[2]) / 100)
            except BaseException:
                process.terminate()
                raise
            status = process.wait()
            output.seek(0)
            result = subprocess.CompletedProcess(command, status, output.read(), "".join(said))
        if result.returncode == 255:
            raise RemoeError(self.unreachable(result.stderr))
        return result

    def ask(self, words: Sequence[str]) -> str:
        """Stdout of a command that must succeed. Raises RemoeError with what it said."""
        result = self.run(words)
        if result.returncode != 0:
            said = result.stderr.strip() or result.stdout.strip() or f"exit status {result.returncode}"
            raise RemoeError(f"{self.name}: {words[0]} failed: {said}")
        return result.stdout

    def script(self, text: str, *words: str) -> str:
        """Stdout of a POSIX shell script of ours; ``words`` are its $1, $2, ..."""
        return self.ask(["sh", "-c", text, "sh", *words])

    def send(self, source: Path, target: str, report: Report = silent, label: str = "") -> None:
        """Copy a file to a path there; what is there of an interrupted copy is used. Raises RemoeError."""
        self._rsync([str(source.resolve()), f"{self._address()}:{target}"], report, label or f"Copying {source.name}")

    def fetch(self, source: str, target: Path) -> None:
        """Copy a file from there."""
        self._rsync([f"{self._address()}:{source}", str(target)], silent, "")

    def unreachable(self, said: str) -> str:
        """One sentence for what ssh said."""
        lines = [line for line in said.strip().splitlines() if line and not line.startswith("Warning:")]
        reason = lines[-1].strip() if lines else "no reason given"
        advice = "check that it is on and its address is right"
        if "Permission denied" in said:
            advice = f"put your key there with: ssh-copy-id {self.name}"
        elif "Host key verification failed" in said:
            advice = f"connect once by hand to see and accept its key: ssh {self.name}"
        return f"{self.name} cannot be reached: {reason}; {advice}"

    def _address(self) -> str:
        # rsync takes the last colon outside brackets for the end of the host.
        user, at, address = self.name.rpartition("@")
        return f"{user}{at}[{address}]" if ":" in address and not address.startswith("[") else self.name

    def _rsync(self, places: Sequence[str], report: Report, label: str) -> None:
        program = shutil.which("rsync")
        if program is None:
            raise RemoeError("no rsync found on this machine; install it: sudo apt install rsync")
        # --protect-args: paths are not seen by the shell there.
        options = ["--partial", "--inplace", "--protect-args", "--times", "--info=progress2", "--no-inc-recursive"]
        command = [program, *options, "-e", shlex.join(self.ssh()), "--", *places]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                line = ""
                while character := process.stdout.read(64):
                    line = (line + character)[-200:]
                    if parts := _PROGRESS.findall(line):
                        report(label, int(parts[-1]) / 100)
                said = process.stderr.read()
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            raise RemoeError(self._rsync_error(process.returncode, said))

    def _rsync_error(self, status: int, said: str) -> str:
        if status in (255, 12) and (
            "command not found" in said or "rsync: not found" in said or "No such file" in said
        ):
            return f"{self.name} has no rsync; install it there: sudo apt install rsync"
        if status == 255 or said.startswith("ssh: "):
            return self.unreachable(said.partition("\nrsync")[0])
        if "No space left on device" in said:
            return f"{self.name} has no space left; free some there, or name another folder with --folder"
        lines = said.strip().splitlines()
        return f"{self.name}: rsync failed: {lines[0] if lines else f'exit status {status}'}"
