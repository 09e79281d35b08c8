"""Compares ways to hold a model's experts: decode runs in fresh processes, taking turns, and one row for each way."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from remoe_edge.gguf_io.layout import Layout, read_model
from remoe_edge.measure.arms import Arm, Options, Turn, plan_arms, schedule
from remoe_edge.measure.cgroup import CgroupUnavailableError, MemoryGroup, memory_group
from remoe_edge.measure.journal import Journal, Record, open_journal
from remoe_edge.measure.llama_bench import runtime_fields
from remoe_edge.measure.pagecache import drop_page_cache
from remoe_edge.measure.rows import Row, add_limits, add_ratios, make_row
from remoe_edge.measure.storage import Bandwidth, expert_slices, measure_bandwidth
from remoe_edge.measure.watch import Watch
from remoe_edge.measure.worker import DecodeFailedError, DecodeRun, Job, decode_in_process
from remoe_edge.progress import Report, silent

_STORAGE_DEPTH = 4
_FINGERPRINT_PAGES = 256
_PAGE = 4096


@dataclass(frozen=True)
class Result:
    """Rows in the order of the arms, and what could not be done as asked, in sentences."""

    rows: list[Row]
    notes: list[str]


def bench(options: Options, report: Report = silent, *, journal: Path | None = None, resume: bool = False) -> Result:
    """Measure every arm on every prompt.

    An arm whose run fails is recorded with the reason and not run again; the others go on. Every run is kept at
    `journal` as soon as it ends; with `resume`, those that are there already are not made again. The file is left for
    the caller to remove once the rows are safe. Raises RemoeError if a model's file cannot be read, or if the journal
    was made with other options.
    """
    layouts = {model: read_model(model) for model in options.models}
    fingerprints = {model: fingerprint(parts) for model, parts in layouts.items()}
    arms = plan_arms(options)
    plan = _plan(options, arms, list(fingerprints.values()))
    with open_journal(journal, plan, resume=resume) if journal else nullcontext(Journal()) as kept:
        turns = list(schedule(len(arms), len(options.workload.prompts), options.repetitions))
        done = {record.turn for record in kept.records}
        failed = {record.turn.arm for record in kept.records if record.run is None}
        pace = _Pace(turns, kept.records)
        with Watch(options.power, options.cool_down_s, _reference(kept.records)) as watch:
            for turn in turns:
                if turn in done or turn.arm in failed:
                    continue
                arm = arms[turn.arm]
                progress = pace.reporter(turn, arm.label, report)
                record = _measure(arm, turn, options, layouts[arm.model], watch, progress)
                kept.append(record)
                pace.add(turn.arm, record.seconds)
                if record.run is None:
                    failed.add(turn.arm)
        records = kept.records
    rows = []
    for model in options.models:
        own = {index for index, arm in enumerate(arms) if arm.model == model}
        probes = [record.storage for record in records if record.turn.arm in own and record.storage]
        if not probes:
            report(f"{model.name}, storage", 1.0)
            probes = _probe(layouts[model], None)
        for index in sorted(own):
            arm_records = [record for record in records if record.turn.arm == index]
            rows.append(make_row(arms[index], options, arm_records, fingerprints[model], probes))
    add_limits(rows)
    add_ratios(rows)
    return Result(rows, list(dict.fromkeys(note for record in records for note in record.notes)))


def _plan(options: Options, arms: Sequence[Arm], fingerprints: list[str]) -> dict[str, Any]:
    """What an interrupted benchmark has to agree in to go on, by the names of the options."""
    return {
        "list of models or arms": [{**asdict(arm), "model": str(arm.model)} for arm in arms],
        "model content": fingerprints,
        "workload or prompt": options.workload.sha256,
        "number of tokens (-n)": options.n_gen,
        "number of threads (-t)": options.n_threads,
        "number of repetitions (-r)": options.repetitions,
        "memory limit": options.memory_limit,
        "page cache state": options.page_cache,
        "power sensor": options.power,
        "number of reader threads": options.cache_threads,
        "checking of reads": options.verify_reads,
        "hot set": None if options.warm is None else hashlib.sha256(options.warm.read_bytes()).hexdigest(),
        "runtime": runtime_fields()["runtime_key"],
        "device": runtime_fields()["device"],
    }


class _Pace:
    """How far a benchmark is, in time: runs of an arm take about as long as its runs before."""

    def __init__(self, turns: Sequence[Turn], records: Sequence[Record]) -> None:
        self._turns = turns
        self._seconds: dict[int, list[float]] = {}
        for record in records:
            self.add(record.turn.arm, record.seconds)

    def add(self, arm: int, seconds: float) -> None:
        self._seconds.setdefault(arm, []).append(seconds)

    def reporter(self, turn: Turn, label: str, report: Report) -> Callable[[float], None]:
        """Takes the part of this turn that is done."""
        index = self._turns.index(turn)
        before, this, after = (
            sum(self._expected(each.arm) for each in part)
            for part in (self._turns[:index], [turn], self._turns[index + 1 :])
        )
        return lambda part: report(label, (before + part * this) / (before + this + after))

    def _expected(self, arm: int) -> float:
        known = self._seconds.get(arm) or [value for values in self._seconds.values() for value in values]
        return statistics.mean(known) if known else 1.0


def _reference(records: Sequence[Record]) -> tuple[dict[str, Any], float | None] | None:
    """State and temperature of the machine before the first of these runs."""
    states = [record.state for record in records if record.state]
    return (states[0]["before"], states[0]["temperature_c"][0]) if states else None


def _measure(
    arm: Arm,
    turn: Turn,
    options: Options,
    layouts: Sequence[Layout],
    watch: Watch,
    progress: Callable[[float], None],
) -> Record:
    """One run of an arm, and of the storage if it depends on that."""
    begin = time.monotonic()
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = [layout.path for layout in layouts]
    prompt = options.workload.prompts[turn.prompt]
    warm = options.page_cache == "warm"
    job = Job(
        model=str(arm.model),
        prompt=prompt.text,
        n_gen=options.n_gen,
        n_threads=options.n_threads,
        cache=arm.cache(options),
        mmap=arm.name == "mmap",
        repack=arm.repack,
        gpu_layers=0 if arm.name == "mmap" else options.gpu_layers,
        chat=prompt.chat,
        # Within the run's own group, so that the memory limit bounds the page cache, too.
        warm_files=tuple(map(str, files)) if warm else (),
    )
    notes: list[str] = []
    progress(0)
    page_cache = drop_page_cache(files)
    if page_cache != "dropped" and not warm:
        notes.append(f"the page cache could not be dropped before each run (state: {page_cache}); run as root")
    before = watch.before(lambda: progress(0))
    notes += [before.note] if before.note else []
    limit = None if arm.name == "resident" else options.memory_limit
    status, reason, run, peak, storage = "ok", None, None, 0, None
    with _group(limit, notes) as group:
        try:
            run, peak = decode_in_process(job, group, progress)
        except DecodeFailedError as failure:
            status, reason = failure.status, str(failure)
    seen = watch.after(before, run)
    if run is not None and seen.invalid:
        status, reason = "invalid", seen.invalid
    if arm.name == "cache":
        # The speed of shared storage changes by the minute: it is measured beside every run that depends on it.
        storage = next(iter(_probe(layouts, run)), None)
    return Record(
        turn=turn,
        status=status,
        reason=reason,
        run=run,
        peak=peak,
        page_cache="warm" if warm else page_cache,
        memory_limit=limit if group else None,
        cgroup=group.version if group else None,
        started=started,
        seconds=time.monotonic() - begin,
        storage=storage,
        energy=seen.energy,
        power=seen.power,
        state=seen.state,
        notes=tuple(notes),
    )


@contextmanager
def _group(limit: int | None, notes: list[str]) -> Iterator[MemoryGroup | None]:
    """A control group for one run; None where groups are not permitted, which is noted if there should be a limit."""
    manager = memory_group(limit)
    try:
        group = manager.__enter__()
    except CgroupUnavailableError as error:
        if limit is not None:
            notes.append(f"{error}; measured without a limit")
        yield None
        return
    try:
        yield group
    finally:
        manager.__exit__(None, None, None)


def _probe(layouts: Sequence[Layout], run: DecodeRun | None) -> list[Bandwidth]:
    """Storage bandwidth with as many reads at once as the cache's readers make; empty for a model without experts."""
    slices = expert_slices(layouts)
    return [measure_bandwidth(slices, run.info.n_threads if run and run.info else _STORAGE_DEPTH)] if slices else []


def fingerprint(layouts: Sequence[Layout]) -> str:
    """A cheap stand-in for a model's hash: SHA-256 over sizes, headers, and 256 pages spread over each file.

    Equal on every machine. Files that differ in a few weights only may have the same one.
    """
    digest = hashlib.sha256()
    for layout in layouts:
        size = layout.path.stat().st_size
        header = min((tensor.start for tensor in layout.tensors.values()), default=size)
        digest.update(size.to_bytes(8, "little"))
        with layout.path.open("rb") as file:
            digest.update(file.read(header))
            for index in range(_FINGERPRINT_PAGES):
                file.seek((size - header) * index // _FINGERPRINT_PAGES + header)
                digest.update(file.read(_PAGE))
    return digest.hexdigest()
