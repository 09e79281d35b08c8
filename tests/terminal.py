"""A program on a pseudo-terminal, as a person would use it."""

import os
import pty
import re
import select
import signal
import sys
import time
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """`remoe-edge` with these arguments; what it shows is kept in `shown`, without escape sequences."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.shown = ""
        self._raw = b""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update({"TERM": "xterm", "COLUMNS": "200", "LINES": "50", **environment})
            os.execv(sys.executable, [sys.executable, "-m", "remoe_edge", *arguments])

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def type(self, text: str) -> None:
        # As a person would, not before a prompt is ready: Python loses a Ctrl-C between showing one and waiting at it.
        time.sleep(0.1)
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """What was shown up to a match of `pattern`, since the last call."""
        until = time.monotonic() + seconds
        while True:
            if match := re.search(pattern, self.shown):
                before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
                return before
            left = until - time.monotonic()
            assert left > 0, f"{pattern!r} was not shown: {self.shown!r}"
            if select.select([self._fd], [], [], left)[0] and not self._read():
                raise AssertionError(f"ended before {pattern!r}: {self.shown!r}")

    def wait(self, seconds: float = 30) -> int:
        """Its exit status."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0] and not self._read():
                break
        assert left > 0, f"did not end: {self.shown!r}"
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 4096)
        except OSError:
            return False
        self._raw += data
        # What may be the beginning of an escape sequence waits for its end.
        whole, mark, tail = self._raw.rpartition(b"\x1b")
        if mark and not re.match(rb"\[[0-9;?]*[A-Za-z]|[=>]", tail):
            self._raw = mark + tail
        else:
            whole, self._raw = self._raw, b""
        self.shown += _ESCAPES.sub("", whole.decode(errors="replace"))
        return bool(data)
