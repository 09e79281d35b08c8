"""Processes that do not outlive what they were started for."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def child_process(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended, one way or another, when the block has; `options` are those of Popen.

    Ctrl-C at a terminal is for this process alone, which then ends the other.
    """
    process = None
    try:
        # Popen that is interrupted leaves a process that nobody knows.
        with _interrupts_deferred():
            process = subprocess.Popen(command, start_new_session=True, **options)
        yield process
    finally:
        if process is not None:
            process.kill()
            # After Ctrl-C, Popen's own block would wait for a quarter of a second only.
            process.wait()
            with process:
                pass


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
