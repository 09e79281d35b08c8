"""A server from its plan to its end: model process, front, signals, and word to systemd."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from remoe_edge.errors import RemoeError
from remoe_edge.files import scratch_folder
from remoe_edge.measure.cgroup import CgroupUnavailableError, MemoryGroup, memory_group
from remoe_edge.power.find import find_source
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.build import Runtime
from remoe_edge.serve.front import Front, Limits, is_loopback
from remoe_edge.serve.heap import keep_heap_compact
from remoe_edge.serve.plan import Plan
from remoe_edge.serve.process import DOWN, READY, ModelProcess
from remoe_edge.serve.sensors import LivePower

_PROGRESS_S = 0.1
_DRAIN_S = 10.0
_SOCKET = "model.sock"


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 chooses a free one."""

    host: str = "127.0.0.1"
    port: int = 8080


@dataclass(frozen=True)
class Ready:
    """What there is to tell once the first request may come.

    Attributes
    ----------
    start_s
        From the start of the model process until it was ready.
    cache
        The labels and gauges of the expert cache, from the metrics; empty without one.
    limited
        Whether a control group keeps the model process within its memory; if not, why.
    """

    url: str
    pid: int
    start_s: float
    cache: dict[str, Any]
    limited: bool
    not_limited: str | None


class Server:
    """One model, served. `on_ready` is called once, `say` with a sentence whenever something happens."""

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        address: Address,
        *,
        limits: Limits,
        keys: Sequence[str] = (),
        power: str = "auto",
        on_ready: Callable[[Ready], None],
        say: Callable[[str], None],
        log: Callable[[str, str], None],
        report: Report = silent,
    ) -> None:
        self._plan, self._runtime, self._address = plan, runtime, address
        self._limits, self._keys, self._power = limits, keys, power
        self._on_ready, self._say, self._log, self._report = on_ready, say, log, report

    def run(self) -> int:
        """Serve until a signal; returns its number. Raises RemoeError if that cannot begin or go on."""
        keep_heap_compact()
        with ExitStack() as stack:
            folder = stack.enter_context(scratch_folder("remoe-edge-serve-"))
            group, reason = stack.enter_context(_group(self._plan.model_memory))
            power = stack.enter_context(LivePower(find_source(self._power).source))
            return asyncio.run(self._serve(folder / _SOCKET, group, reason, power))

    async def _serve(self, path: Path, group: MemoryGroup | None, reason: str | None, power: LivePower) -> int:
        command = self._plan.command(self._runtime.bin_dir / "llama-server", path)
        process = ModelProcess(command, path, group=group, log=self._log)
        front = Front(
            self._plan,
            process,
            limits=self._limits,
            keys=self._keys,
            loopback=is_loopback(self._address.host),
            power=power,
        )
        signalled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        for number in signal.SIGINT, signal.SIGTERM:
            asyncio.get_running_loop().add_signal_handler(number, _note, signalled, number)
        process.on_change(self._tell)
        runner, port = await self._listen(front)
        running = asyncio.create_task(process.run())
        try:
            begin = time.monotonic()
            await self._load(process, running, signalled)
            if process.state == READY:
                host = f"[{self._address.host}]" if ":" in self._address.host else self._address.host
                ready = Ready(
                    f"http://{host}:{port}",
                    os.getpid(),
                    time.monotonic() - begin,
                    await _cache_metrics(path),
                    group is not None,
                    reason,
                )
                self._on_ready(ready)
                notify("READY=1")
            either: set[asyncio.Future[Any]] = {running, signalled}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            notify("STOPPING=1")
            await self._drain(front, signalled)
            return signalled.result()
        finally:
            process.stop()
            if not running.done():
                await running
            await runner.cleanup()
            await front.close()

    async def _listen(self, front: Front) -> tuple[Any, int]:
        try:
            return await front.start(self._address.host, self._address.port)
        except OSError as error:
            await front.close()
            raise RemoeError(
                f"cannot listen on {self._address.host} port {self._address.port}: {error.strerror or error}; "
                "choose another --port or --host"
            ) from error

    async def _load(self, process: ModelProcess, running: asyncio.Task[None], signalled: asyncio.Future[int]) -> None:
        """Show progress until the process is ready for the first time, has failed, or a signal came."""
        either: set[asyncio.Future[Any]] = {running, signalled}
        while process.state != READY and not running.done() and not signalled.done():
            self._report("loading the model", _loaded(process.pid, self._plan))
            await asyncio.wait(either, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self, front: Front, signalled: asyncio.Future[int]) -> None:
        """Let running answers end, for a while; a second signal ends the wait."""
        again: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        for number in signal.SIGINT, signal.SIGTERM:
            asyncio.get_running_loop().add_signal_handler(number, _note, again, number)
        end = time.monotonic() + _DRAIN_S
        if front.in_flight and signalled.result() == signal.SIGTERM:
            self._say(f"waiting up to {_DRAIN_S:.0f} s for {front.in_flight} answers to end")
            while front.in_flight and time.monotonic() < end and not again.done():
                await asyncio.sleep(0.1)

    def _tell(self, process: ModelProcess) -> None:
        if process.state == DOWN:
            self._say(f"the model process died: {process.reason}; starting it again")
            notify(f"STATUS=restarting: {process.reason}")
        elif process.state == READY and process.restarts:
            self._say(f"the model process is ready again, process {process.pid}")
            notify("STATUS=serving")


def _note(future: asyncio.Future[int], number: int) -> None:
    if not future.done():
        future.set_result(number)


@contextmanager
def _group(limit: int | None) -> Iterator[tuple[MemoryGroup | None, str | None]]:
    """A control group of this size where one is wanted and possible, and why it is not."""
    with ExitStack() as stack:
        group, reason = None, None
        if limit is not None:
            try:
                group = stack.enter_context(memory_group(limit))
            except CgroupUnavailableError as error:
                reason = str(error)
        yield group, reason


def _loaded(pid: int | None, plan: Plan) -> float | None:
    """The part of the weights that the process has read; None where that is not known, as for mapped files."""
    if pid is None or not plan.cache.enabled:
        return None
    with suppress(OSError):
        found = re.search(r"^rchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
        if found:
            return min(0.99, int(found[1]) / max(1, plan.weights))
    return None


async def _cache_metrics(path: Path) -> dict[str, Any]:
    """What the expert cache decided."""
    connector = aiohttp.UnixConnector(str(path))
    async with aiohttp.ClientSession(connector=connector) as client, client.get("http://model/metrics") as answer:
        text = await answer.text()
    found: dict[str, Any] = {
        name: int(float(value))
        for name, value in re.findall(r"^remoe_expert_cache_(\w+) (\S+)$", text, re.MULTILINE)
        if name in ("budget_bytes", "used_bytes", "floor_bytes", "expert_bytes", "slots")
    }
    info = re.search(r"^remoe_expert_cache_info\{(.*)\} 1$", text, re.MULTILINE)
    return {**found, **dict(re.findall(r'(\w+)="([^"]*)"', info[1]))} if info else {}


def notify(state: str) -> None:
    """Tell systemd, if it asked (sd_notify(3)): a datagram to the socket that it names."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address)
