"""What clients talk to: keeps limits, answers while the model process is down, adds metrics, serves the page.

A request is read whole before the model process sees it, so that a slow client holds nothing but its connection.
Errors have OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from remoe_edge.measure.worker import process_memory
from remoe_edge.serve.plan import REQUESTS_AT_ONCE, Plan
from remoe_edge.serve.process import READY, STARTING, ModelProcess
from remoe_edge.serve.sensors import LivePower, chip_temperatures

PAGE = Path(__file__).parent / "page.html"

_GENERATE = (
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/completions",
    "/completion",
    "/v1/responses",
    "/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/infill",
)
"""Paths that need a slot."""

_ASK = (
    "/v1/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)
_READ = ("/v1/models", "/models", "/props")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KEEP_ALIVE_S = 20.0
"""Also for the headers of a request to arrive, and for a connection that sends nothing."""

_STREAM = web.RequestKey("stream", web.StreamResponse)
"""Where a request keeps its answer once the status has been sent."""

_FORWARDED = ("Content-Type", "Accept")
_RETURNED = ("Content-Type", "Cache-Control")


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes
    ----------
    request_s
        For an answer, from the end of the request's arrival: waiting for a slot, reading, generating.
    client_s
        For a client to send a request's body, and to take each part of an answer.
    """

    request_s: float = 900.0
    client_s: float = 30.0


class _RefusalError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, retry_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.retry_s = status, message, kind, code, retry_s

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> web.Response:
        headers = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=headers)


def _died() -> _RefusalError:
    return _RefusalError(
        503, "the model process ended while it answered; it is being restarted", "unavailable_error", "died", 2
    )


class _ClientGoneError(Exception):
    """Nobody takes the answer."""


class Front:
    """The HTTP server in front of one model process. `loopback` tells that it listens on this machine only."""

    def __init__(
        self,
        plan: Plan,
        process: ModelProcess,
        *,
        limits: Limits,
        keys: Sequence[str] = (),
        loopback: bool = True,
        power: LivePower | None = None,
    ) -> None:
        self._plan = plan
        self._process = process
        self._limits = limits
        self._keys = [key.encode() for key in keys]
        self._loopback = loopback
        self._power = power
        self._in_flight = 0
        self._body_bytes = 0
        self._answers: Counter[int] = Counter()
        self._client: aiohttp.ClientSession | None = None

    async def start(self, host: str, port: int) -> tuple[web.ServerRunner, int]:
        """Listen; the runner's `cleanup` ends it. Returns the port, too, which is chosen if `port` is 0."""
        self._client = aiohttp.ClientSession(
            # No limit of its own: `_admit` has one. Fresh connections, because the other side may be a new process.
            connector=aiohttp.UnixConnector(str(self._process.socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self._limits.request_s),
            auto_decompress=False,
        )
        server = web.Server(
            self._handle, handler_cancellation=True, keepalive_timeout=_KEEP_ALIVE_S, access_log=None, lingering_time=2
        )
        runner = web.ServerRunner(server)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        await site.start()
        return runner, runner.addresses[0][1]

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    @property
    def in_flight(self) -> int:
        """Requests that have a slot or wait for one."""
        return self._in_flight

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            response = await self._route(request)
        except _RefusalError as refusal:
            response = refusal.response()
        except _ClientGoneError:
            response = request[_STREAM]
        self._answers[response.status] += 1
        return response

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        self._refuse_foreign_pages(request)
        path = request.path
        if request.method in ("GET", "HEAD"):
            if path in ("/", "/index.html"):
                return web.Response(body=PAGE.read_bytes(), content_type="text/html", charset="utf-8", headers=_PAGE)
            if path in ("/health", "/v1/health"):
                return await self._health()
        self._check_key(request)
        allowed = {"/metrics": "GET", "/plan": "GET", **dict.fromkeys(_READ, "GET")}
        allowed |= dict.fromkeys((*_GENERATE, *_ASK), "POST")
        method = allowed.get(path)
        if method is None:
            raise _RefusalError(404, f"there is nothing at {path}", "invalid_request_error", "not_found")
        if request.method != method:
            raise _RefusalError(405, f"{path} takes {method}, not {request.method}", "invalid_request_error")
        if path == "/metrics":
            return await self._metrics()
        if path == "/plan":
            return web.json_response({**self._plan.fields(), "state": self._process.state})
        self._check_model()
        if method == "GET":
            return await self._forward(request, None)
        with self._body_room() as room:
            body = await self._body(request, room)
            _refuse_bad_json(body)
            if path in _ASK:
                return await self._forward(request, body)
            with self._admit():
                return await self._forward(request, body)

    def _refuse_foreign_pages(self, request: web.BaseRequest) -> None:
        """A web page elsewhere must not use a server on this machine through its reader's browser."""
        if self._keys:
            return
        host = _hostname(request.headers.get("Host", ""))
        origin = request.headers.get("Origin")
        if self._loopback and host not in _LOOPBACK:
            raise _RefusalError(403, f"this server answers to localhost, not to {host!r}", "permission_error")
        if origin is not None and _hostname(origin.partition("://")[2]) != host:
            raise _RefusalError(403, f"pages of {origin} may not use this server without a key", "permission_error")

    def _check_key(self, request: web.BaseRequest) -> None:
        if not self._keys:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key", "")
        # All are compared, in constant time, so that the time tells nothing.
        if not sum(hmac.compare_digest(given.encode(errors="replace"), key) for key in self._keys):
            raise _RefusalError(401, "the API key is missing or wrong", "invalid_request_error", "invalid_api_key")

    def _check_model(self) -> None:
        if self._process.state == READY:
            return
        if self._process.state == STARTING and not self._process.restarts:
            raise _RefusalError(503, "the model is being loaded", "unavailable_error", "loading", 2)
        why = f" ({self._process.reason})" if self._process.reason else ""
        raise _RefusalError(503, f"the model process is being restarted{why}", "unavailable_error", "restarting", 2)

    @contextmanager
    def _admit(self) -> Iterator[None]:
        if self._in_flight >= self._plan.slots + self._plan.queue:
            raise _RefusalError(
                429,
                f"{self._plan.slots} requests are being answered and {self._plan.queue} are waiting; try again later",
                "rate_limit_error",
                "rate_limit_exceeded",
                1,
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextmanager
    def _body_room(self) -> Iterator[list[int]]:
        """Counts what the bodies of all requests take while they are here."""
        taken = [0]
        try:
            yield taken
        finally:
            self._body_bytes -= taken[0]

    async def _body(self, request: web.BaseRequest, taken: list[int]) -> bytes:
        limit = self._plan.max_request
        too_large = _RefusalError(
            413,
            f"the request has more than {limit} bytes, which is more than a context of {self._plan.ctx} tokens holds "
            "(serve --max-request sets this limit)",
            "invalid_request_error",
            "request_too_large",
        )
        if (request.content_length or 0) > limit:
            raise too_large
        if request.headers.get("Expect", "").lower() == "100-continue":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts: list[bytes] = []

        async def read() -> None:
            while chunk := await request.content.readany():
                taken[0] += len(chunk)
                self._body_bytes += len(chunk)
                if taken[0] > limit:
                    raise too_large
                if self._body_bytes > REQUESTS_AT_ONCE * limit:
                    raise _RefusalError(
                        503, "too many large requests at once; try again later", "unavailable_error", "busy", 1
                    )
                parts.append(chunk)

        try:
            await asyncio.wait_for(read(), self._limits.client_s)
        except asyncio.TimeoutError:
            seconds = f"{self._limits.client_s:g}"
            raise _RefusalError(
                408, f"the request did not arrive within {seconds} s", "invalid_request_error", "too_slow"
            ) from None
        return b"".join(parts)

    async def _forward(self, request: web.BaseRequest, body: bytes | None) -> web.StreamResponse:
        assert self._client is not None
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        response: web.StreamResponse | None = None
        try:
            async with self._client.request(
                request.method, f"http://model{request.path_qs}", data=body, headers=headers
            ) as answer:
                kept = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
                if "text/event-stream" not in kept.get("Content-Type", ""):
                    return web.Response(status=answer.status, body=await answer.read(), headers=kept)
                response = request[_STREAM] = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await self._send(request, response, chunk)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            refusal = self._too_long() if isinstance(error, asyncio.TimeoutError) else _died()
            if response is None:
                raise refusal from None
            await self._end_stream(request, response, refusal)
        with suppress(OSError):
            await response.write_eof()
        return response

    async def _send(self, request: web.BaseRequest, response: web.StreamResponse, chunk: bytes) -> None:
        try:
            await asyncio.wait_for(response.write(chunk), self._limits.client_s)
        except (asyncio.TimeoutError, OSError):
            # It has left, or does not read what it asked for.
            if request.transport is not None:
                request.transport.abort()
            raise _ClientGoneError from None

    async def _end_stream(self, request: web.BaseRequest, response: web.StreamResponse, refusal: _RefusalError) -> None:
        """The status has been sent: what went wrong follows as an event, as llama-server does it."""
        await self._send(request, response, b"data: " + refusal.body() + b"\n\n")

    def _too_long(self) -> _RefusalError:
        return _RefusalError(
            504, f"the request took longer than {self._limits.request_s:g} s", "timeout_error", "timeout"
        )

    async def _health(self) -> web.Response:
        """Red (503) while the model process is not ready, and while it says that experts cannot be read."""
        self._check_model()
        assert self._client is not None
        try:
            async with self._client.get("http://model/health", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")
        except (aiohttp.ClientError, asyncio.TimeoutError):
            raise _RefusalError(503, "the model process does not answer", "unavailable_error", "no_answer", 2) from None

    async def _metrics(self) -> web.Response:
        assert self._client is not None
        text = ""
        if self._process.state == READY:
            with suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with self._client.get("http://model/metrics", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                    text = await answer.text()
        return web.Response(text=text + self._own_metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def _own_metrics(self) -> str:
        lines: list[str] = []

        def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
            lines.extend((f"# HELP remoe_{name} {text}", f"# TYPE remoe_{name} {kind}"))
            lines.extend(f"remoe_{name}{labels} {value:.15g}" for labels, value in values.items())

        process, plan, power = self._process, self._plan, self._power
        add("up", "gauge", "1 if the model process is ready", {"": process.state == READY})
        add("restarts_total", "counter", "Restarts of the model process", {"": process.restarts})
        add("requests_in_flight", "gauge", "Requests that have a slot or wait for one", {"": self._in_flight})
        answers = {f'{{status="{status}"}}': count for status, count in sorted(self._answers.items())}
        add("answers_total", "counter", "Answers by HTTP status", dict(answers))
        memory = {'{process="front"}': process_memory(os.getpid())}
        if process.pid is not None:
            memory['{process="model"}'] = process_memory(process.pid)
        add("memory_bytes", "gauge", "Anonymous and shared memory", dict(memory))
        if plan.memory is not None:
            add("memory_limit_bytes", "gauge", "What all processes together may take", {"": plan.memory})
        if power is not None and power.watts is not None:
            label = f'{{sensor="{power.source.sensor}"}}'
            add("power_watts", "gauge", "Power now", {label: power.watts})
            add("energy_joules_total", "counter", "Energy since the start", {label: power.joules})
        if zones := chip_temperatures():
            by_zone = {f'{{zone="{zone}"}}': value for zone, value in zones.items()}
            add("temperature_celsius", "gauge", "Temperature of the chip by zone", by_zone)
        return "\n".join(lines) + "\n"


_PAGE = {
    "Cache-Control": "no-cache",
    # The page loads nothing but metrics, from here.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def _refuse_bad_json(body: bytes) -> None:
    """llama-server answers to what is no JSON as if it were its own fault."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise _RefusalError(400, f"the request is not valid JSON: {reason}", "invalid_request_error") from None
    if not isinstance(content, dict):
        raise _RefusalError(400, "the request is not a JSON object", "invalid_request_error")


def _hostname(authority: str) -> str:
    """The name in "host:port", "[::1]:port" or "host"."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    return host in _LOOPBACK or host.startswith("127.")


def read_keys(path: Path) -> list[str]:
    """The API keys in a file, one a line; empty lines and those that begin with # do not count."""
    lines: Any = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]
