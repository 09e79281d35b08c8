"""Messages as a person types or pastes them, or as a pipe brings them, one a line."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, ModuleType
from typing import NoReturn

_PROMPT, _MORE = "> ", "... "


class Lines:
    """Reads stdin: from a terminal with line editing, and a pasted text of many lines is one message."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        """`words` are completed by the tab key at the start of a line."""
        self.interactive = sys.stdin.isatty()
        self.interrupted_typing = False
        """Whether there was something in the line that the last Ctrl-C ended."""
        self._readline: ModuleType | None = None
        # Python edits lines only if the prompt goes to the terminal, too.
        if self.interactive and sys.stdout.isatty():
            with suppress(ImportError):
                self._readline = importlib.import_module("readline")
        if self._readline is not None:
            # Python switches it off; without it each line of a pasted text would be a message.
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._readline.parse_and_bind("tab: complete")
            self._readline.set_completer_delims("")
            self._readline.set_completer(lambda text, state: _completion(words, text, state))

    def read(self) -> str | None:
        """The next message; None at the end. A line that ends with a backslash goes on in the next."""
        line = self._line(_PROMPT)
        while line is not None and line.endswith("\\") and not line.endswith("\\\\"):
            more = self._line(_MORE)
            line = line[:-1] + ("\n" + more if more is not None else "")
            if more is None:
                break
        return line

    def _line(self, prompt: str) -> str | None:
        if self._readline is not None:
            before = signal.signal(signal.SIGINT, self._interrupt)
            try:
                return input(prompt)
            except EOFError:
                return None
            finally:
                signal.signal(signal.SIGINT, before)
        if self.interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> NoReturn:
        # The line is gone once the exception arrives.
        assert self._readline is not None
        self.interrupted_typing = bool(self._readline.get_line_buffer().strip())
        raise KeyboardInterrupt


def _completion(words: Sequence[str], text: str, state: int) -> str | None:
    matches = [word for word in words if text and word.startswith(text)]
    return matches[state] if state < len(matches) else None
