"""Parts of `remoe-edge serve` that need no runtime: the front, the watch over the model process, sensors, systemd."""

import asyncio
import gc
import json
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.power.source import PowerSource, SensorError
from remoe_edge.runtime.llama import CacheConfig
from remoe_edge.serve.front import Front, Limits, is_loopback, read_keys
from remoe_edge.serve.plan import Plan
from remoe_edge.serve.process import DOWN, READY, ModelProcess
from remoe_edge.serve.sensors import LivePower
from remoe_edge.serve.server import notify

ROOT = Path(__file__).parent.parent

# Answers /health as llama-server does, on a Unix socket, until it is told to die or killed.
MODEL = """
import http.server, os, socketserver, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def address_string(self):
        return ""
    def log_message(self, *_):
        pass
class Server(socketserver.UnixStreamServer):
    pass
if sys.argv[2] == "fail":
    sys.stderr.write("0.01 E llama_model_load: error loading model: bad.gguf is no model\\n")
    sys.exit(1)
if sys.argv[2] == "talk":
    for number in range(2000):
        sys.stderr.write(f"0.01 I line {number} " + "x" * 20_000 + "\\n")
    sys.stderr.flush()
with Server(sys.argv[1], Handler) as server:
    if sys.argv[2] == "die":
        server.handle_request()
        time.sleep(0.5)
        os.abort()
    server.serve_forever()
"""


def plan(**changes: object) -> Plan:
    given: dict[str, object] = {
        "model": Path("model.gguf"),
        "alias": "model",
        "slots": 1,
        "ctx": 512,
        "n_ctx_train": 512,
        "threads": 1,
        "queue": 1,
        "max_request": 1000,
        "embeddings": False,
        "pools": False,
        "chat_template": None,
        "cache": CacheConfig("auto"),
        "memory": None,
        "budget": None,
        **dict.fromkeys(("weights", "kv_cache", "compute", "prompt_cache", "process", "front", "expert_bytes"), 0),
    }
    return Plan(**{**given, **changes})  # type: ignore[arg-type]


def with_front(
    tmp_path: Path,
    test: Callable[[aiohttp.ClientSession, str, Front], Awaitable[None]],
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    *,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    state: str = READY,
) -> None:
    """Run `test` against a front whose model process is `handler`."""

    async def run() -> None:
        path = tmp_path / "model.sock"
        model = web.ServerRunner(web.Server(handler))
        await model.setup()
        await web.UnixSite(model, str(path)).start()
        process = ModelProcess([], path)
        process.state = state
        front = Front(plan(), process, limits=limits or Limits(5, 5), keys=keys)
        runner, port = await front.start("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as client:
                await test(client, f"http://127.0.0.1:{port}", front)
        finally:
            await front.close()
            await runner.cleanup()
            await model.cleanup()

    asyncio.run(run())


async def echo(request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"path": request.path_qs, "body": (await request.read()).decode()})


class TestFront:
    def test_passes_requests_on(self, tmp_path: Path) -> None:
        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            async with client.post(f"{url}/v1/completions", data=b"{}") as answer:
                assert await answer.json() == {"path": "/v1/completions", "body": "{}"}
            async with client.get(f"{url}/v1/models?x=1") as answer:
                assert (await answer.json())["path"] == "/v1/models?x=1"

        with_front(tmp_path, test, echo)

    def test_pages_of_others_may_not_use_a_server_without_a_key(self, tmp_path: Path) -> None:
        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            for headers, status in (
                ({"Host": "evil.example"}, 403),
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": url}, 200),
                ({"Host": "localhost:8080"}, 200),
                ({"Host": "[::1]:8080"}, 200),
            ):
                async with client.get(f"{url}/v1/models", headers=headers) as answer:
                    assert answer.status == status, headers

        with_front(tmp_path, test, echo)

    def test_a_key_opens_the_api_in_both_forms(self, tmp_path: Path) -> None:
        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            for headers, status in (
                ({}, 401),
                ({"Authorization": "Bearer two"}, 200),
                ({"X-Api-Key": "one"}, 200),
                ({"Authorization": "Bearer on"}, 401),
            ):
                async with client.get(f"{url}/v1/models", headers=headers) as answer:
                    assert answer.status == status, headers
            # Without a key: whether it lives, and the page that asks for one.
            for path in "/", "/health":
                async with client.get(f"{url}{path}") as answer:
                    assert answer.status == 200

        with_front(tmp_path, test, echo, keys=("one", "two"))

    def test_too_large_with_and_without_a_length(self, tmp_path: Path) -> None:
        async def parts() -> object:
            for _ in range(20):
                yield b"x" * 100

        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            for data in b"x" * 1001, parts():
                async with client.post(f"{url}/v1/completions", data=data) as answer:
                    assert answer.status == 413
                    assert "1000 bytes" in (await answer.json())["error"]["message"]

        with_front(tmp_path, test, echo)

    def test_the_model_process_ends_in_the_middle_of_a_stream(self, tmp_path: Path) -> None:
        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b'data: {"choices": []}\n\n')
            assert request.transport is not None
            request.transport.abort()
            return response

        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            async with client.post(f"{url}/v1/completions", data=b"{}") as answer:
                assert answer.status == 200
                *_, last = (await answer.text()).strip().split("\n\n")
                assert "being restarted" in json.loads(last.removeprefix("data: "))["error"]["message"]
            assert front.in_flight == 0

        with_front(tmp_path, test, handler)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_request_that_takes_too_long(self, tmp_path: Path, stream: bool) -> None:
        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            if stream:
                await response.prepare(request)
                await response.write(b'data: {"choices": []}\n\n')
            await asyncio.sleep(20)
            return response

        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            begin = time.monotonic()
            async with client.post(f"{url}/v1/completions", data=b"{}") as answer:
                assert answer.status == (200 if stream else 504)
                assert "took longer than 0.5 s" in await answer.text()
            assert time.monotonic() - begin < 5
            assert front.in_flight == 0

        with_front(tmp_path, test, handler, limits=Limits(0.5, 5))

    def test_a_client_that_does_not_read(self, tmp_path: Path) -> None:
        gone = asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 100_000)
            finally:
                gone.set()

        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            host, _, port = url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port))) as deaf:
                deaf.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
                await asyncio.wait_for(gone.wait(), 10)
            assert front.in_flight == 0

        with_front(tmp_path, test, handler, limits=Limits(20, 0.5))

    def test_while_there_is_no_model(self, tmp_path: Path) -> None:
        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            for path in "/v1/models", "/health":
                async with client.get(f"{url}{path}") as answer:
                    assert answer.status == 503
                    assert answer.headers["Retry-After"] == "2"
            async with client.get(f"{url}/metrics") as answer:
                assert "remoe_up 0" in (await answer.text()).splitlines()

        with_front(tmp_path, test, echo, state=DOWN)

    @pytest.mark.parametrize("leaks", [False, True])
    def test_nothing_is_kept_of_requests(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaks: bool) -> None:
        """Whatever a client asks, and however that ends: bytes and objects do not grow with the number of requests.

        With `leaks` a KB is kept of each that arrives, to show that the test would see it.
        """
        kept: list[bytes] = []

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            if leaks:
                kept.append(bytes(1000))
            if b"stream" not in await request.read():
                return await echo(request)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            with suppress(ConnectionError):
                for _ in range(30):
                    await response.write(b"data: " + b"x" * 5000)
            return response

        async def ask(client: aiohttp.ClientSession, url: str, number: int) -> None:
            path = f"/v1/completions?n={number}"
            for method, rest, given in (
                ("POST", path, {"data": b'{"n": %d}' % number}),
                ("POST", path, {"data": b'{"stream": true}'}),
                ("POST", path, {"data": b"{"}),
                ("POST", path, {"data": b"x" * 1001}),
                ("GET", f"/{number}", {}),
                ("GET", f"/v1/models?n={number}", {"headers": {"Origin": f"https://{number}.example"}}),
                ("GET", "/metrics", {}),
                ("GET", "/health", {}),
            ):
                async with client.request(method, url + rest, **given) as answer:  # type: ignore[arg-type]
                    await answer.read()
            # One that goes away in the middle of its answer.
            async with client.post(url + path, data=b'{"stream": true}') as answer:
                await answer.content.readany()
                answer.close()

        async def test(client: aiohttp.ClientSession, url: str, front: Front) -> None:
            number, sizes = 0, []
            for rounds in 25, 15, 15:
                for _ in range(rounds):
                    await ask(client, url, number := number + 1)
                while front.in_flight:
                    await asyncio.sleep(0.01)
                gc.collect()
                sizes.append((tracemalloc.get_traced_memory()[0], len(gc.get_objects()), len(asyncio.all_tasks())))
            # What is made once may be made in any round; what is made for each request is made in all.
            bytes_, objects, tasks = (
                min(after - before for before, after in pairwise(each)) for each in zip(*sizes, strict=True)
            )
            assert (bytes_ < 32_000) is not leaks, sizes
            assert objects < 30, sizes
            assert tasks <= 0, sizes

        tracemalloc.start()
        try:
            with_front(tmp_path, test, handler, limits=Limits(20, 5))
        finally:
            tracemalloc.stop()


class TestModelProcess:
    def run(self, tmp_path: Path, mode: str, until: Callable[[ModelProcess], bool]) -> ModelProcess:
        path = tmp_path / "model.sock"

        async def follow() -> ModelProcess:
            process = ModelProcess([sys.executable, "-c", MODEL, str(path), mode], path)
            process.on_change(lambda changed: changed.stop() if until(changed) else None)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.run(), 30)
            assert process.pid is None
            return process

        return asyncio.run(follow())

    def test_is_started_again_when_it_dies(self, tmp_path: Path) -> None:
        process = self.run(tmp_path, "die", lambda it: it.restarts == 1 and it.state == READY)
        assert process.restarts == 1

    def test_what_never_starts_is_not_tried_again(self, tmp_path: Path) -> None:
        with pytest.raises(RemoeError, match=r"did not start: bad\.gguf is no model"):
            self.run(tmp_path, "fail", lambda _: False)

    def test_of_what_it_says_only_the_end_is_kept(self, tmp_path: Path) -> None:
        """A server that runs for months says much, and a line may hold a prompt."""
        process = self.run(tmp_path, "talk", lambda it: it.state == READY)
        assert 100 < len(process._lines) < 1000
        assert sum(len(text) for _, text in process._lines) < 500_000
        assert process._lines[-1][1].startswith("line 1999 ")

    def test_what_dies_again_and_again_is_given_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("remoe_edge.serve.process._BACK_OFF_S", (0.01, 0.02))
        with pytest.raises(RemoeError, match=r"died 3 times in a row, at last: it was ended by SIGABRT"):
            self.run(tmp_path, "die", lambda _: False)


class _Source(PowerSource):
    name, sensor, period_s = "test", "VDD", 0.01

    def __init__(self, values: list[float], counter: bool) -> None:
        self.values, self.counter = values, counter

    def read(self) -> float:
        if not self.values:
            raise SensorError("gone")
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


class TestLivePower:
    def test_watts_and_energy(self) -> None:
        with LivePower(_Source([5.0], counter=False), 0.01) as power:
            time.sleep(0.3)
        assert power.watts == 5.0
        assert 0.5 < power.joules < 1.6

    def test_a_counter_gives_its_rise(self) -> None:
        with LivePower(_Source([100.0, 100.0, 101.0, 101.0], counter=True), 0.02) as power:
            time.sleep(0.3)
        assert power.watts == 0
        assert power.joules == pytest.approx(1.0)

    def test_a_sensor_that_fails_shows_nothing(self) -> None:
        with LivePower(_Source([], counter=False), 0.01) as power:
            time.sleep(0.05)
        assert power.watts is None


def test_keys_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n two \n")
    assert read_keys(path) == ["one", "two"]


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.2", "::", "jetson")))


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"
    # A manager that has gone must not end the server.
    notify("STOPPING=1")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_file_is_understood_by_systemd(tmp_path: Path) -> None:
    unit = tmp_path / "remoe-edge.service"
    text = (ROOT / "jetson" / "systemd" / "remoe-edge.service").read_text()
    unit.write_text(text.replace("/opt/remoe-edge/bin/remoe-edge", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--expert-cache", "off", "--io", "direct"], 2, "--io has no effect with --expert-cache off"),
        ([], 1, "no such file"),
    ],
)
def test_wrong_usage(arguments: list[str], status: int, message: str) -> None:
    result = CliRunner().invoke(cli, ["serve", "nothing.gguf", *arguments])
    assert result.exit_code == status
    assert message in (result.stderr or str(result.exception))


def test_an_empty_key_file_is_refused(tmp_path: Path) -> None:
    model, keys = tmp_path / "model.gguf", tmp_path / "keys"
    model.write_bytes(b"GGUF")
    keys.write_text("# none\n")
    result = CliRunner().invoke(cli, ["serve", str(model), "--api-key-file", str(keys)])
    assert "holds no key" in str(result.exception)
