"""Commands with a fault at their n-th change of a folder: killed there, a write cut in half, or failing from there on.

Commands run in forks of one process that has imported everything, so that hundreds of them take seconds. What counts
and what breaks is `faults.c`, loaded before all other libraries.

Run as a program this file is that process: it reads requests from stdin and answers on stdout, both as lines of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNT, KILL, TEAR, ONCE = 0, -2, -3, 1000
FULL, FAILING = errno.ENOSPC, errno.EIO

_SOURCE = Path(__file__).parent / "faults.c"


@dataclass(frozen=True)
class Ended:
    """`status` as of `subprocess`; `text` is stdout and stderr; `calls` are (name, path) of all calls that counted."""

    status: int
    text: str
    calls: list[tuple[str, Path]] = field(default_factory=list)


def compile_faults(folder: Path) -> Path:
    """The library to preload."""
    library = folder / "faults.so"
    command = [os.environ.get("CC", "cc"), "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", library, _SOURCE, "-ldl"], check=True, timeout=60)
    return library


class Zygote:
    """The process that forks. `imports` are modules that every fork has."""

    def __init__(self, library: Path, *imports: str) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self._log = library.parent / f"calls-{'-'.join(imports)[:40]}-{os.getpid()}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(library), str(self._log), *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        folder: Path,
        *arguments: object,
        nth: int = 0,
        action: int = COUNT,
        call: str = "",
        user: int | None = None,
    ) -> Ended:
        """Run `remoe-edge ARGUMENTS` in `folder`; temporary files belong into its subfolder `tmp`.

        `call`, "module:function", runs that function instead; `user` is the id of the user to become.
        """
        (folder / "tmp").mkdir(exist_ok=True)
        request = {"folder": str(folder), "arguments": list(map(str, arguments)), "nth": nth, "action": action}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "call": call, "user": user}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        calls = [line.split(" ", 2)[1:] for line in self._log.read_text().splitlines()]
        return Ended(answer["status"], answer["text"], [(name, Path(path)) for name, path in calls])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@contextlib.contextmanager
def zygote(folder: Path, *imports: str) -> Iterator[Zygote]:
    process = Zygote(compile_faults(folder), *imports)
    try:
        yield process
    finally:
        process.close()


def worth_trying(calls: Sequence[tuple[str, Path]], every: bool = False) -> list[int]:
    """Numbers of calls, from 1: all, or the first and the last of each name for each file."""
    # Two runs name a temporary file differently.
    kinds = [(name, re.sub(r"tmp-\d+-[0-9a-f]{8}", "tmp", str(path))) for name, path in calls]
    first = {kind: number for number, kind in reversed(list(enumerate(kinds, start=1)))}
    last = {kind: number for number, kind in enumerate(kinds, start=1)}
    return list(range(1, len(calls) + 1)) if every else sorted({*first.values(), *last.values()})


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder; folders are there as names that end in a slash."""
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def refill(folder: Path, files: dict[str, bytes]) -> Path:
    """Make the folder hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        if name.endswith("/"):
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(data)
    return folder


def _serve(library: str, log: str, imports: Sequence[str]) -> None:
    for name in imports:
        importlib.import_module(name)
    from remoe_edge import cli

    faults = ctypes.CDLL(library)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        calls = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                _child(faults, cli, request, said.fileno(), calls)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps({"status": status, "text": said.read().decode(errors="replace")}), flush=True)
        os.close(calls)


def _child(faults: Any, cli: Any, request: dict[str, Any], said: int, calls: int) -> None:
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        folder = Path(request["folder"])
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        if request["user"] is not None:
            _become(request["user"])
        sys.argv = ["remoe-edge", *request["arguments"]]
        module, _, name = request["call"].partition(":")
        function = getattr(importlib.import_module(module), name) if module else cli._run
        faults.fault_arm(str(folder).encode(), ctypes.c_long(request["nth"]), request["action"], calls)
        status = function()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _become(user: int) -> None:
    """Become a user who may read all files, wherever Python and the inputs lie, and write only those that all may."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setgid(user)
    libc.prctl(8, 1)  # PR_SET_KEEPCAPS
    os.setuid(user)
    read_all = 1 << 2  # CAP_DAC_READ_SEARCH
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(read_all, read_all)
    assert libc.capset(header, sets) == 0


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.argv[3:])
