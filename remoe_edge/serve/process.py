"""The model process, llama-server, watched over: started, asked whether it is ready, started again when it dies."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp

from remoe_edge.errors import RemoeError
from remoe_edge.measure.cgroup import MemoryGroup

STARTING, READY, DOWN, STOPPED = "starting", "ready", "down", "stopped"

_ASK_S = 0.1
_STOP_S = 10.0
_LINES_KEPT, _CHARACTERS_KEPT = 200, 1000
"""Of the log, for the reason of a crash: a line may hold a whole prompt."""
_BACK_OFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits before a restart, one longer than the other; the process is given up when there is none left."""
_STABLE_S = 60.0
"""A process that was ready for so long begins anew with the first of the waits."""

_LOG_LINE = re.compile(r"^(?:[\d.]+ )?([DIWE]) (.*)$")


class ModelProcess:
    """One llama-server on a Unix socket.

    Attributes
    ----------
    state
        STARTING, READY, DOWN (died, will be started again) or STOPPED.
    reason
        Why it is DOWN, as a sentence.
    restarts
        How often it was started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        socket: Path,
        *,
        group: MemoryGroup | None = None,
        log: Callable[[str, str], None] = lambda level, line: None,
    ) -> None:
        """`log` is called with the level (D, I, W, E) and the text of every line that the process writes."""
        self.state = STOPPED
        self.reason = ""
        self.restarts = 0
        self.pid: int | None = None
        self.socket = socket
        self._command = list(command)
        self._group = group
        self._log = log
        self._lines: deque[tuple[str, str]] = deque(maxlen=_LINES_KEPT)
        self._oom_kills = 0
        self._stopping = asyncio.Event()
        self._changed: list[Callable[[ModelProcess], None]] = []

    def on_change(self, callback: Callable[[ModelProcess], None]) -> None:
        """Call `callback` after every change of `state`."""
        self._changed.append(callback)

    async def run(self) -> None:
        """Keep it running until `stop`.

        Raises RemoeError, with its own words, if it ends before it was ready for the first time, or dies again and
        again. When the call ends, however it does, the process has ended.
        """
        failures = 0
        was_ready = False
        while not self._stopping.is_set():
            self._set(STARTING)
            ready_s, status = await self._run_once()
            was_ready = was_ready or ready_s is not None
            if self._stopping.is_set():
                break
            reason = self._why(status)
            if not was_ready:
                self._set(STOPPED)
                raise RemoeError(f"llama-server did not start: {reason}")
            failures = 0 if ready_s is not None and ready_s >= _STABLE_S else failures
            if failures == len(_BACK_OFF_S):
                self._set(STOPPED)
                raise RemoeError(f"llama-server died {failures + 1} times in a row, at last: {reason}")
            self._set(DOWN, reason)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _BACK_OFF_S[failures])
            failures += 1
            self.restarts += 1
        self._set(STOPPED)

    def stop(self) -> None:
        """Let `run` end the process and return."""
        self._stopping.set()

    async def _run_once(self) -> tuple[float | None, int]:
        """Start it and wait for its end: for how many seconds it was ready, None if never, and its exit status."""
        self.socket.unlink(missing_ok=True)
        self._lines.clear()
        command = _with_parent(self._command)
        process = await asyncio.create_subprocess_exec(
            *(self._group.command(command) if self._group else command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
            # Ctrl-C at a terminal is for this process alone, which then ends the other.
            start_new_session=True,
        )
        self.pid = process.pid
        reader = asyncio.create_task(self._read_log(process))
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        ready_at: float | None = None
        try:
            answering = asyncio.create_task(self._until_ready())
            await asyncio.wait({answering, ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            if not ended.done() and not stopping.done():
                ready_at = time.monotonic()
                self._set(READY)
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await _end(process)
            await reader
            self.pid = None
        return None if ready_at is None else time.monotonic() - ready_at, process.returncode or 0

    async def _until_ready(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as client:
            while True:
                with suppress(aiohttp.ClientError, OSError):
                    async with client.get("http://model/health") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(_ASK_S)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                data = await process.stderr.readline()
            except ValueError:  # a line longer than asyncio's buffer
                continue
            if not data:
                return
            line = data.decode(errors="replace").rstrip()
            found = _LOG_LINE.match(line)
            level, text = (found[1], found[2]) if found else ("I", line)
            self._lines.append((level, text[:_CHARACTERS_KEPT]))
            self._log(level, text)

    def _why(self, status: int) -> str:
        kills = self._group.oom_kills() if self._group else 0
        more, self._oom_kills = kills > self._oom_kills, kills
        if more:
            return "the kernel killed it because it took more memory than --memory; raise it, or lower --ctx or --slots"
        if status < 0:
            name = signal.Signals(-status).name
            return f"it was ended by {name}"
        errors = [text.partition(": ")[2] or text for level, text in self._lines if level == "E"]
        for text in errors:
            if "error loading model: " in text:
                return text.partition("error loading model: ")[2]
        return errors[0].strip() if errors else f"it ended with status {status}"

    def _set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        for callback in self._changed:
            callback(self)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _with_parent(command: list[str]) -> list[str]:
    """`command`, killed by the kernel when this process ends, even by kill -9."""
    tool = shutil.which("setpriv") if sys.platform == "linux" else None
    return [tool, "--pdeathsig", "KILL", *command] if tool else command


def _environment() -> dict[str, str]:
    """Ours, without what would configure llama-server behind the back of the plan."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    # Many threads answer requests; each with an arena of its own would hold what it once used.
    return {**kept, "MALLOC_ARENA_MAX": "2"}
