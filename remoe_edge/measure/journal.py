"""Runs as they end, on disk, so that a benchmark that was interrupted can go on.

A journal is JSONL next to the output: first the plan, then one line for each run. A line that was cut off by a crash is
dropped when the journal is read.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from remoe_edge.errors import RemoeError
from remoe_edge.files import append_line, writing
from remoe_edge.measure.arms import Turn
from remoe_edge.measure.storage import Bandwidth
from remoe_edge.measure.worker import DecodeRun

_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One run that ended.

    Attributes
    ----------
    status, reason
        "ok"; or "failed" or "killed" and why; or "invalid": measured, but the machine changed meanwhile.
    run
        None where the run failed.
    peak
        Anonymous and shared memory in bytes.
    cgroup
        Version of the control group that the run had to itself; None if it had none.
    seconds
        That the whole run took, loading included.
    storage
        Measured right after a run with the expert cache.
    energy, power
        Fields of `RunEnergy`, and the samples from start to end: {"t_ms": [...], "watts": [...], "tokens_ms": [...]}.
    state
        Device state before and after the run.
    notes
        What could not be done as asked.
    """

    turn: Turn
    status: str
    reason: str | None
    run: DecodeRun | None
    peak: int
    page_cache: str
    memory_limit: int | None
    cgroup: int | None
    started: str
    seconds: float
    storage: Bandwidth | None = None
    energy: dict[str, Any] | None = None
    power: dict[str, list[float]] | None = None
    state: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Record:
        run, storage = content["run"], content["storage"]
        return cls(
            **{
                **content,
                "turn": Turn(**content["turn"]),
                "run": DecodeRun.from_json(run) if run else None,
                "storage": Bandwidth(**storage) if storage else None,
                "notes": tuple(content["notes"]),
            }
        )


class Journal:
    """Records of the runs made so far. Obtained from `open_journal`, or empty and kept in memory only."""

    def __init__(self, records: list[Record] | None = None, file: IO[bytes] | None = None) -> None:
        self.records = records or []
        self._file = file

    def append(self, record: Record) -> None:
        """Keep a run; it is on disk when this returns. Raises RemoeError if it cannot be written."""
        self.records.append(record)
        if self._file is not None:
            append_line(self._file, asdict(record))


def journal_path(output: Path) -> Path:
    """Where the journal of a benchmark that writes `output` is."""
    return output.with_name(f"{output.name}.partial")


def refuse_interrupted(output: Path, *, resume: bool, force: bool) -> None:
    """Raise RemoeError if an interrupted benchmark would be thrown away, or there is none to go on with."""
    path = journal_path(output)
    if resume and not path.exists():
        raise RemoeError(f"{path} does not exist: nothing to go on with; leave out --resume")
    if path.exists() and not resume and not force:
        raise RemoeError(
            f"{path} holds the runs of an interrupted benchmark; pass --resume to go on with it, "
            "or --force to start again"
        )


@contextmanager
def open_journal(path: Path, plan: dict[str, Any], *, resume: bool) -> Iterator[Journal]:
    """The journal at `path`: a new one, or with `resume` the one that is there.

    Raises RemoeError if that was made for another plan, if another process writes it, and where no file can be written.
    """
    with writing(path):
        opened = path.open("a+b")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RemoeError(f"{path}: another benchmark is writing it; choose another --output") from error
        # Through JSON, so that it is compared as it is read.
        header = json.loads(json.dumps({"remoe_edge_journal": _VERSION, "plan": plan}))
        records: list[Record] = []
        with writing(path):
            if resume:
                records = _resume(path, file, header)
            else:
                file.truncate(0)
                file.seek(0)
        if not file.tell():
            append_line(file, header)
        yield Journal(records, file)


def read_journal(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The plan and the records so far of a benchmark that may be running. Raises RemoeError if it is no journal."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        raise RemoeError(f"{path}: the benchmark has not begun yet")
    try:
        return _parse(whole)
    except (ValueError, KeyError, TypeError) as error:
        raise RemoeError(f"{path}: is not a journal of this version") from error


def _parse(content: bytes) -> tuple[dict[str, Any], list[Record]]:
    first, *others = [json.loads(line) for line in content.splitlines()]
    return first["plan"] if first["remoe_edge_journal"] == _VERSION else {}, [Record.from_json(each) for each in others]


def _resume(path: Path, file: IO[bytes], header: dict[str, Any]) -> list[Record]:
    """The records of a journal that was made for `header`; what follows the last whole line is cut off."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
    if not whole:
        return []
    try:
        found, records = _parse(content[:whole])
    except (ValueError, KeyError, TypeError) as error:
        raise RemoeError(f"{path}: is not a journal of this version; pass --force to start again") from error
    if differing := [name for name, value in header["plan"].items() if found.get(name) != value]:
        raise RemoeError(
            f"{path}: was made with another {', another '.join(differing)}; give the same options as before, "
            "or --force to start again"
        )
    return records
