import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from remoe_edge.processes import child_process

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_ends_with_the_block() -> None:
    with child_process(SLEEP) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="mine"), child_process(SLEEP, stdout=subprocess.PIPE) as process:
        raise ValueError("mine")
    assert process.returncode == -signal.SIGKILL
    assert process.stdout is not None
    assert process.stdout.closed


def test_an_interrupt_while_it_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), child_process(SLEEP):
        raise AssertionError("the block must not run")
    assert started[0].returncode == -signal.SIGKILL
    assert not Path(f"/proc/{started[0].pid}").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread() -> None:
    codes = []

    def work() -> None:
        with child_process([sys.executable, "-c", ""]) as process:
            codes.append(process.wait(60))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]
