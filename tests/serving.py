"""A running `remoe-edge serve`, for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_S = 60.0


@dataclass
class Serving:
    """`ready` is what --json printed; `said` are the lines on stderr so far."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    log: Path
    key: str | None = None
    said: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        url: str = self.ready["url"]
        return url

    @property
    def stderr(self) -> str:
        return self.log.read_text()

    def request(
        self, path: str, body: object = None, *, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, content (parsed if it is JSON) and headers."""
        if body is not None:
            data = json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        if self.key and "Authorization" not in given:
            given["Authorization"] = f"Bearer {self.key}"
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, given), timeout=WAIT_S) as answer:
                status, content, found = answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                status, content, found = error.code, error.read(), dict(error.headers)
        is_json = "json" in found.get("Content-Type", "")
        return status, json.loads(content) if is_json else content.decode(), found

    def error(self, path: str, body: object = None, **given: Any) -> tuple[int, str]:
        """Status and message of an answer that must be an error in OpenAI's form."""
        status, content, _ = self.request(path, body, **given)
        assert isinstance(content["error"]["message"], str), content
        return status, content["error"]["message"]

    def metrics(self) -> dict[str, float]:
        """All metrics; those with labels as they stand there."""
        text = self.request("/metrics")[1]
        return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}

    def total(self, name: str) -> float:
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def model_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(child) for child in children if "llama-server" in Path(f"/proc/{child}/cmdline").read_text()]
        return pid


def eventually(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Wait until `condition` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def serving(
    model: Path, folder: Path, *arguments: str, key: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[Serving]:
    """Serve on a free port until the end of the context; then ended by SIGTERM, which must work."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "remoe_edge", "serve", str(model), "--port", "0", "--json", "-t", "1", *arguments]
    given = {**os.environ, **({"LLAMA_API_KEY": key} if key else {}), **(environment or {})}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=given) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield Serving(process, json.loads(line), log, key)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_S) == 128 + signal.SIGTERM, log.read_text()
        finally:
            process.kill()
