"""Before the first run: what of a model fits into some memory, and what time per token to expect.

Memory is divided as the runtime's `auto` does it: dense weights, KV cache and compute buffers come first, a tenth of
what is left (at least 128 MiB) is left alone, the rest is the budget of the expert cache.

Hit rates are those of the second half of a trace: the first fills the slots and teaches the policy. Where all experts
are held there are no misses, once each was read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np

from remoe_edge.device.memory import available
from remoe_edge.errors import RemoeError
from remoe_edge.files import scratch_file
from remoe_edge.gguf_io.layout import Layout, align, read_model
from remoe_edge.measure.memory_speed import memory_bandwidth
from remoe_edge.measure.rows import tpot_ns
from remoe_edge.measure.storage import Bandwidth, Slice, expert_slices, measure_bandwidth
from remoe_edge.measure.worker import DecodeFailedError, Job, decode_in_process
from remoe_edge.progress import Report, silent
from remoe_edge.routing.predict import bytes_per_token, check_model_of, predict_tpot
from remoe_edge.routing.simulate import Simulation, simulate_all
from remoe_edge.routing.trace import PACKAGED_TRACES, Trace, packaged_trace
from remoe_edge.runtime.budget import READERS, ExpertGroup, cache_bytes, expert_groups, floor_bytes, slots_for
from remoe_edge.runtime.budget import least_slots as least
from remoe_edge.runtime.budget import most_slots as most
from remoe_edge.runtime.footprint import Footprint, footprint
from remoe_edge.runtime.llama import POLICIES, CacheConfig, default_threads
from remoe_edge.runtime.wheel import installed_manifest
from remoe_edge.sizes import format_size

STEP = 512 << 20
"""The next piece of memory, whose worth is told."""

_MIB = 1 << 20
_RESERVE = 128 << 20
_RESIDENT_TOKENS = 9
_SCRATCH_BYTES = 512 << 20
# The default policy learns while a trace runs: less of it, or a smaller lead of another, says little.
_TELLING_TOKENS, _TELLING_RATE = 500, 0.01
_PROMPT = "The harbour lies still in the morning."


@dataclass(frozen=True)
class Memory:
    """How so many bytes are divided; `cache` is what is left for the expert cache, possibly less than nothing."""

    total: int
    dense: int
    kv: int
    compute: int
    reserve: int

    @property
    def cache(self) -> int:
        return self.total - self.dense - self.kv - self.compute - self.reserve

    @classmethod
    def divide(cls, total: int, needs: Footprint) -> Memory:
        """As reserve_of and on_context of llama-experts.cpp."""
        left = total - needs.dense - needs.kv
        return cls(total, needs.dense, needs.kv, needs.compute, max(left // 10, _RESERVE))

    def total_for(self, cache: int) -> int:
        """The least memory that leaves so many bytes for the expert cache."""
        taken = self.compute + cache
        return self.dense + self.kv + max(taken + _RESERVE, -(-taken * 10 // 9))


@dataclass(frozen=True)
class Resident:
    """Time per token with all experts in memory; `source` says how it is known: "given", "measured", "predicted".

    A prediction is a lower bound: what a token reads from memory over `bytes_per_s`.
    """

    ms: float
    source: str
    read_bytes: int | None = None
    bytes_per_s: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Option:
    """A number of slots per layer, and what to expect of it.

    Attributes
    ----------
    budget
        Bytes of the expert cache.
    memory
        Bytes of everything, with what is left alone.
    hit_rate, hit_rate_low, hit_rate_high
        Of the nearest trace, and the range over all traces that were asked.
    bytes_per_token
        To read, at `hit_rate`.
    limit_ms, no_overlap_ms
        TPOT at best, with `hit_rate_high` and reads that overlap wholly with compute, and at worst, with `hit_rate_low`
        and no overlap.
    """

    slots: int
    budget: int
    memory: int
    fits: bool
    hit_rate: float
    hit_rate_low: float
    hit_rate_high: float
    bytes_per_token: float
    limit_ms: float
    no_overlap_ms: float


@dataclass(frozen=True)
class Plan:
    """What fits, what to choose, and what more memory would buy.

    Attributes
    ----------
    policies
        Hit rate of each policy of the runtime at the recommended budget.
    recommended
        What all of the memory pays for, or all experts.
    next
        With `STEP` bytes more; None if all experts are held already.
    """

    model: Path
    n_ctx: int
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    memory: Memory
    floor: int
    storage_bytes_per_s: float
    storage: Bandwidth | None
    resident: Resident
    traces: list[str]
    own_trace: bool
    policy: str
    policies: dict[str, float]
    options: list[Option]
    recommended: Option
    next: Option | None

    @property
    def budget(self) -> str:
        """The recommended budget as `--expert-cache` takes it."""
        size = self.recommended.budget
        if self.recommended.slots < self.experts:
            size = self.memory.cache
        whole = size // _MIB * _MIB
        return f"{whole // _MIB}MiB" if whole >= self.floor else str(size)

    @property
    def command(self) -> list[str]:
        """What to call next."""
        policy = [] if self.policy == POLICIES[0] else ["--policy", self.policy]
        return ["remoe-edge", "run", str(self.model), "--expert-cache", self.budget, *policy, "--ctx", str(self.n_ctx)]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; sizes in bytes, times in milliseconds."""
        content = asdict(self)
        content["model"] = str(self.model)
        content["memory"]["cache"] = self.memory.cache
        content["recommended_budget"] = self.budget
        content["command"] = self.command
        return content


def make_plan(
    model: Path,
    *,
    memory: int | None = None,
    n_ctx: int = 4096,
    trace: Trace | None = None,
    storage: Path | None = None,
    storage_bytes_per_s: float | None = None,
    resident_ms: float | None = None,
    n_threads: int | None = None,
    report: Report = silent,
) -> Plan:
    """Plan to run ``model``, a GGUF with experts.

    Parameters
    ----------
    memory
        Bytes for everything; by default what is free now.
    trace
        The model's own routing. Without it packaged traces of other models stand in, at the same part of experts held.
    storage
        A file or folder on the storage to measure; by default the model's own file.
    storage_bytes_per_s, resident_ms
        Known already, so not measured.
    n_threads
        Compute threads of the measurement of T_resident.

    Raises RemoeError, with numbers, if not even one token's experts fit.
    """
    layouts = read_model(model)
    groups = expert_groups(layouts)
    if trace is not None:
        check_model_of(trace, groups, str(model))
    needs = footprint(layouts, n_ctx)
    divided = Memory.divide(available() if memory is None else memory, needs)
    _refuse_too_little(model, divided, groups, n_ctx)

    bandwidth = None
    if storage_bytes_per_s is None:
        bandwidth = _measure_storage(storage, layouts, report)
        storage_bytes_per_s = bandwidth.bytes_per_s
    resident = (
        Resident(resident_ms, "given")
        if resident_ms is not None
        else _resident(model, layouts, groups, needs, n_threads or default_threads(), report)
    )
    curves = Curves(groups, [trace] if trace is not None else None, report)

    own = {policy: slots_for(groups, divided.cache, policy) for policy in POLICIES}
    possible = [policy for policy in POLICIES if own[policy]]
    rates = {policy: curves.rates([own[policy]], policy)[own[policy]][0] for policy in possible}
    policy = choose_policy(rates, curves.traces[0].tokens)
    slots = own[policy]
    more = slots_for(groups, divided.cache + STEP, policy) if slots < most(groups) else None
    chosen = {slots, more or slots, least(groups), most(groups)}
    chosen |= {max(least(groups), most(groups) * eighths // 8) for eighths in (1, 2, 3, 4, 6)}
    found = curves.rates(sorted(chosen), policy)

    def option(count: int) -> Option:
        size = cache_bytes(groups, count, policy)
        rate, low, high = found[count]
        read = {value: curves.bytes_per_token(count, policy, value) for value in (rate, low, high)}
        best = predict_tpot(resident.ms, read[high], storage_bytes_per_s)
        worst = predict_tpot(resident.ms, read[low], storage_bytes_per_s)
        total = divided.total - divided.cache + size
        return Option(
            count, size, total, size <= divided.cache, rate, low, high, read[rate], best.limit_ms, worst.no_overlap_ms
        )

    options = [option(count) for count in sorted(chosen)]
    by_slots = {each.slots: each for each in options}
    recommended = by_slots[slots]
    if more is None:
        # Room for what repacked kernels take beside the experts, which the runtime uses if it is there.
        whole = sum(group.experts * group.expert_bytes for group in groups)
        roomy = max(recommended.budget, whole + whole // 500 + 16 * _MIB)
        recommended = replace(recommended, budget=min(roomy, divided.cache))
    return Plan(
        model=model,
        n_ctx=n_ctx,
        layers=len(groups),
        experts=most(groups),
        top_k=least(groups),
        expert_bytes=sum(group.experts * group.expert_bytes for group in groups),
        memory=divided,
        floor=floor_bytes(groups, policy),
        storage_bytes_per_s=storage_bytes_per_s,
        storage=bandwidth,
        resident=resident,
        traces=[each.origin for each in curves.traces],
        own_trace=trace is not None,
        policy=policy,
        policies=rates,
        options=options,
        recommended=recommended,
        next=by_slots[more] if more is not None else None,
    )


def choose_policy(rates: Mapping[str, float], tokens: int) -> str:
    """The policy with the highest hit rate, but the runtime's default unless another is better beyond chance.

    ``rates`` are hit rates by policy, on a trace of so many tokens.
    """
    best = max(rates, key=lambda name: rates[name])
    default = POLICIES[0]
    if default in rates and (tokens < _TELLING_TOKENS or rates[best] < rates[default] + _TELLING_RATE):
        return default
    return best


def _refuse_too_little(model: Path, memory: Memory, groups: Sequence[ExpertGroup], n_ctx: int) -> None:
    need = min(floor_bytes(groups, policy) for policy in POLICIES)
    if memory.cache >= need:
        return
    raise RemoeError(
        f"{model}: {format_size(memory.total)} of memory are {format_size(need - memory.cache)} too little: dense "
        f"weights take {format_size(memory.dense)}, the KV cache of {n_ctx} tokens {format_size(memory.kv)}, compute "
        f"buffers about {format_size(memory.compute)}, {format_size(memory.reserve)} stay free, and the least expert "
        f"cache, {least(groups)} slots in each of {len(groups)} layers, takes {format_size(need)}; give --memory "
        f"{align(memory.total_for(need), _MIB) // _MIB}MiB, or use a smaller --ctx or quantisation"
    )


class Curves:
    """Hit rates at a number of slots, from the model's own trace or from those of others.

    Another model's trace is asked at the same part of the experts, between two numbers of slots by interpolation, and
    never below its own floor.
    """

    def __init__(self, groups: Sequence[ExpertGroup], traces: Sequence[Trace] | None, report: Report) -> None:
        self._groups = groups
        self._own = traces is not None
        self._report = report
        self._rows: dict[tuple[int, int, str], Simulation] = {}
        shape = most(groups) / least(groups)
        packaged = [] if traces else [packaged_trace(name) for name in PACKAGED_TRACES]
        # The nearest first: it gives the expected value, the others the range.
        packaged.sort(key=lambda trace: abs(np.log(trace.experts / trace.top_k / shape)))
        self.traces = list(traces or packaged)

    def rates(self, slots: Sequence[int], policy: str) -> dict[int, tuple[float, float, float]]:
        """By slots: the hit rate of the nearest trace, the lowest and the highest."""
        for index, trace in enumerate(self.traces):
            halves = replace(trace, offs=np.array([0, trace.tokens // 2, trace.tokens]))
            wanted = {each for count in slots for each in self._places(trace, count)}
            missing = sorted(count for count in wanted if (index, count, policy) not in self._rows)
            runs = [(count, policy) for count in missing]
            for row in simulate_all(halves, runs, report=self._report) if runs else ():
                self._rows[index, row.slots, policy] = row
        result = {}
        for count in slots:
            rates = [self._rate(index, count, policy) for index in range(len(self.traces))]
            result[count] = rates[0], min(rates), max(rates)
        return result

    def bytes_per_token(self, slots: int, policy: str, rate: float) -> float:
        """To read at a hit rate; the model's own trace knows how misses are spread over layers of different size."""
        sizes = [group.expert_bytes for group in self._groups]
        if self._own:
            if slots == most(self._groups):
                return 0.0
            tokens = self.traces[0].tokens - self.traces[0].tokens // 2
            misses = self._rows[0, slots, policy].counters[:, 1, 1]
            return bytes_per_token([float(each / tokens) for each in misses], sizes)
        return bytes_per_token([(1 - rate) * group.top_k for group in self._groups], sizes)

    def _places(self, trace: Trace, slots: int) -> list[int]:
        place = self._place(trace, slots)
        return [floor(place), ceil(place)]

    def _place(self, trace: Trace, slots: int) -> float:
        return max(float(trace.top_k), slots / most(self._groups) * trace.experts)

    def _rate(self, index: int, slots: int, policy: str) -> float:
        trace = self.traces[index]
        places = self._places(trace, slots)
        rates = []
        for place in places:
            hits, misses, _ = self._rows[index, place, policy].counters[:, 1].sum(axis=0)
            rates.append(1.0 if place == trace.experts else float(hits / max(1, hits + misses)))
        return float(np.interp(self._place(trace, slots), places, rates)) if places[0] < places[1] else rates[0]


def _measure_storage(path: Path | None, layouts: Sequence[Layout], report: Report) -> Bandwidth:
    """The speed of random reads of an expert's slice from the model's files, or from a file or folder elsewhere."""
    slices = expert_slices(layouts)
    if path is None:
        return measure_bandwidth(slices, READERS, report=report)
    length = sorted(each.length for each in slices)[len(slices) // 2]
    if path.is_file():
        return measure_bandwidth(_pieces(path, path.stat().st_size, length), READERS, report=report)
    if not path.is_dir():
        raise RemoeError(f"{path}: is no file or folder; give one on the storage that is to be measured")
    state = os.statvfs(path)
    # As large as the model's experts, so that a small model needs no large file.
    size = min(_SCRATCH_BYTES, max(sum(each.length for each in slices), 16 * READERS * length))
    size = min(size, state.f_bavail * state.f_frsize // 2) // length * length
    if size < READERS * length:
        raise RemoeError(f"{path}: has too little free space to measure its storage; give a file there to read instead")
    with scratch_file(path / "remoe-edge-probe") as scratch:
        # Random, as drives may not store zeros.
        piece = os.urandom(length)
        with scratch.open("wb") as file:
            for done in range(0, size, length):
                file.write(piece)
                report("writing a file to measure the storage", done / size)
            file.flush()
            os.fsync(file.fileno())
        return measure_bandwidth(_pieces(scratch, size, length), READERS, report=report)


def _pieces(path: Path, size: int, length: int) -> list[Slice]:
    if size < length:
        raise RemoeError(f"{path}: is smaller than an expert's slice of {length} bytes; give a larger file to read")
    return [Slice(path, start, length) for start in range(0, size - length + 1, length)]


def _resident(
    model: Path,
    layouts: Sequence[Layout],
    groups: Sequence[ExpertGroup],
    needs: Footprint,
    n_threads: int,
    report: Report,
) -> Resident:
    """Measured, if the whole model fits into what is free now and there is a runtime; else predicted."""
    experts = sum(group.experts * group.expert_bytes for group in groups)
    fits = Memory.divide(available(), needs).cache >= experts
    note = "the model does not fit into memory" if not fits else "no runtime is installed (remoe-edge build)"
    if fits and installed_manifest() is not None:
        report("measuring T_resident", 0.0)
        job = Job(str(model), _PROMPT, _RESIDENT_TOKENS, n_threads, CacheConfig("off"), mmap=False, repack=False)
        try:
            run, _ = decode_in_process(job, progress=lambda part: report("measuring T_resident", part))
            return Resident(tpot_ns(run.token_ns) / 1e6, "measured")
        except DecodeFailedError as error:
            note = f"a run failed: {error}"
    report("measuring memory bandwidth", None)
    read = needs.read + sum(group.top_k * group.expert_bytes for group in groups)
    speed = memory_bandwidth()
    return Resident(read / speed * 1e3, "predicted", read, speed, note)
