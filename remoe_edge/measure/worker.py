"""One decode run in a process of its own: ``python -m remoe_edge.measure.worker``.

The process takes a `Job` as JSON on stdin and writes lines of JSON on stdout: ``{"progress": 0.5}`` now and then, at
the end ``{"result": ...}`` or ``{"error": "..."}``. `decode_in_process` is the other side of it.

Decoding is greedy, and the end-of-generation token does not end it, so that all runs of a prompt have equal lengths.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from remoe_edge.errors import RemoeError
from remoe_edge.files import scratch_folder
from remoe_edge.measure.cgroup import MemoryGroup
from remoe_edge.processes import child_process
from remoe_edge.runtime.gpu import Device
from remoe_edge.runtime.llama import CacheConfig, CacheInfo, CacheStats, Session, gpu_devices, load_model

_SAMPLE_S = 0.05
_PROGRESS_NS = 500_000_000
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 8 << 20
_CLOCK_READS = 20_000


@dataclass(frozen=True)
class Job:
    """What to decode, and how.

    Attributes
    ----------
    cache
        Budget "off" is stock behaviour.
    chat
        Put the prompt into the model's chat template, if it has one.
    warm_files
        Files to read through before the model is loaded, so that the page cache holds what fits of them.
    gpu_layers
        As in `layers_on_gpu`.
    """

    model: str
    prompt: str
    n_gen: int
    n_threads: int
    cache: CacheConfig
    mmap: bool
    repack: bool
    n_batch: int = 512
    n_ubatch: int = 512
    chat: bool = False
    warm_files: tuple[str, ...] = ()
    gpu_layers: int | str = 0


@dataclass(frozen=True)
class GpuUse:
    """Layers of the model on GPUs, -1 for all, and the bytes that these had less afterwards.

    On a board whose CPU and GPU share one memory, other processes and `memory` of the run are part of them.
    """

    layers: int
    backend: str
    device: str
    bytes: int

    @classmethod
    def of(cls, layers: int, before: list[Device], after: list[Device]) -> GpuUse:
        taken = sum(old.free - new.free for old, new in zip(before, after, strict=True))
        return cls(layers, before[0].backend, ", ".join(device.label for device in before), taken)


@dataclass(frozen=True)
class TokenCounters:
    """What happened between each token and the one before it: lists of n_gen - 1 numbers.

    Attributes
    ----------
    hits, misses, bytes, stall_ns
        Of the expert cache; None without it. `bytes` are those it read.
    major_faults
        Of the process.
    read_bytes
        What the kernel fetched from storage for the process; None where it does not tell.
    """

    hits: list[int] | None
    misses: list[int] | None
    bytes: list[int] | None
    stall_ns: list[int] | None
    major_faults: list[int]
    read_bytes: list[int] | None


@dataclass(frozen=True)
class LayerCounters:
    """Of each MoE layer after the first token; as in `CacheStats`."""

    hits: list[int]
    misses: list[int]
    forecast_experts: list[int] | None = None
    forecast_used: list[int] | None = None


@dataclass(frozen=True)
class DecodeRun:
    """What one decode run did. Times in nanoseconds, sizes in bytes.

    Attributes
    ----------
    token_ns
        When each token was chosen, from the start of the prompt's evaluation; the first is the TTFT. The clock stands
        still while logits are hashed and counters are read.
    load_ns
        From the start of the load until decoding could begin: with a context, and with all experts where they fit.
    start_ns, pause_ns
        When the prompt's evaluation began on CLOCK_MONOTONIC, and how long the clock stood still after each token:
        token i was chosen at start_ns + token_ns[i] + sum(pause_ns[:i]).
    timer_ns
        What reading the clock cost each token, measured in the same process.
    prefill, decode
        Counters of the expert cache before and after the first token; None without it.
    major_faults, read_bytes
        Of the process, after the first token. Bytes are what the kernel fetched from storage for it, read-ahead of
        mapped files included; None where the kernel does not tell.
    output_sha256
        Of the chosen token ids as little-endian int32.
    logits_sha256
        Of the logits that each token was chosen from, float32 [n_gen, n_vocab].
    memory
        Anonymous and shared memory of the process, "start": before the model, "loaded": after it, "ready": with the
        context, "end".
    gpu
        None if no layer was on one.
    """

    n_prompt: int
    n_gen: int
    token_ns: list[int]
    prefill: CacheStats | None
    decode: CacheStats | None
    major_faults: int
    read_bytes: int | None
    output_sha256: str
    logits_sha256: str
    text: str
    info: CacheInfo | None
    kernels: str
    model_description: str
    model_bytes: int
    model_params: int
    memory: dict[str, int]
    chat_template: bool = False
    load_ns: int = 0
    start_ns: int = 0
    pause_ns: list[int] = field(default_factory=list)
    timer_ns: float = 0.0
    tokens: TokenCounters | None = None
    layers: LayerCounters | None = None
    gpu: GpuUse | None = None

    @property
    def moments_ns(self) -> list[int]:
        """When each token was chosen, on CLOCK_MONOTONIC."""
        paused = itertools.accumulate([self.start_ns, *self.pause_ns])
        return [begin + time for begin, time in zip(paused, self.token_ns, strict=False)]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DecodeRun:
        nested = {
            "prefill": CacheStats,
            "decode": CacheStats,
            "info": CacheInfo,
            "tokens": TokenCounters,
            "layers": LayerCounters,
            "gpu": GpuUse,
        }
        parts = {key: kind(**content[key]) if content.get(key) is not None else None for key, kind in nested.items()}
        return cls(**{**content, **parts})


class DecodeFailedError(RemoeError):
    """A decode run ended without a result. `status` is "failed", or "killed" where a signal ended it."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode(job: Job, progress: Callable[[float], None] = lambda fraction: None) -> DecodeRun:
    """Load the model, evaluate the prompt and generate `n_gen` tokens, in this process."""
    for name in job.warm_files:
        _read_through(Path(name))
    memory = {"start": process_memory("self")}
    path = Path(job.model)
    devices = gpu_devices()
    begin = time.monotonic_ns()
    with (
        _own_hot_set(job.cache) as cache,
        load_model(path, cache, mmap=job.mmap, repack=job.repack, gpu_layers=job.gpu_layers) as model,
    ):
        memory["loaded"] = process_memory("self")
        chat = job.chat and model.has_chat_template
        # A chat template writes out the special tokens itself.
        text = model.chat_prompt(job.prompt) if chat else job.prompt
        prompt = model.tokenize(text, add_special=not chat)
        if not prompt:
            raise RemoeError("the prompt is empty; give some text")
        n_ctx = len(prompt) + job.n_gen
        with model.session(n_ctx=n_ctx, n_batch=job.n_batch, n_ubatch=job.n_ubatch, n_threads=job.n_threads) as context:
            info = context.info()
            warm = info.warm if info else ""
            if warm not in ("", "loaded", "all experts fit"):
                raise RemoeError(f"{job.cache.warm}: the hot set cannot be used: {warm}")
            if warm != "loaded":
                # Where all experts fit, as in a resident run, decoding begins when they are there.
                context.wait_loaded()
            load_ns = time.monotonic_ns() - begin
            memory["ready"] = process_memory("self")
            gpu = GpuUse.of(model.gpu_layers, devices, gpu_devices()) if model.gpu_layers else None
            run = _generate(context, prompt, job.n_gen, memory, progress)
            return replace(run, chat_template=chat, load_ns=load_ns, gpu=gpu)


@contextmanager
def _own_hot_set(cache: CacheConfig) -> Iterator[CacheConfig]:
    """The same cache on a copy of its hot set: the runtime writes what is hot at the end."""
    if cache.warm is None:
        yield cache
        return
    with scratch_folder("remoe-edge-hot-") as folder:
        yield replace(cache, warm=str(shutil.copy(cache.warm, folder / "hot")))


def _generate(
    session: Session, prompt: list[int], n_gen: int, memory: dict[str, int], progress: Callable[[float], None]
) -> DecodeRun:
    tokens: list[int] = []
    token_ns: list[int] = []
    pause_ns: list[int] = []
    counters: list[_Counters] = []
    logits_hash = hashlib.sha256()
    reported = start = begin = time.monotonic_ns()
    session.decode(prompt)
    for token in session.generate(n_gen):
        now = time.monotonic_ns()
        tokens.append(token)
        token_ns.append(now - begin)
        logits_hash.update(session.logits().tobytes())
        if len(tokens) == 1:
            prefill = session.stats()
            session.reset_stats()
        counters.append(_Counters.of(session))
        if now - reported > _PROGRESS_NS:
            reported = now
            progress(len(tokens) / n_gen)
        pause_ns.append(time.monotonic_ns() - now)
        begin += pause_ns[-1]
    first, last = counters[0], counters[-1]
    memory["end"] = process_memory("self")
    info = session.info()
    return DecodeRun(
        n_prompt=len(prompt),
        n_gen=n_gen,
        token_ns=token_ns,
        prefill=prefill,
        decode=last.stats,
        major_faults=last.major_faults - first.major_faults,
        read_bytes=None if first.read_bytes is None or last.read_bytes is None else last.read_bytes - first.read_bytes,
        output_sha256=hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest(),
        logits_sha256=logits_hash.hexdigest(),
        text=session.detokenize(tokens),
        info=info,
        kernels=session.kernels,
        model_description=session.description,
        model_bytes=session.n_bytes,
        model_params=session.n_params,
        memory=memory,
        start_ns=start,
        pause_ns=pause_ns,
        timer_ns=2 * _clock_cost_ns(),
        tokens=_token_counters(counters),
        layers=_layer_counters(session, info.n_layers) if info else None,
    )


@dataclass(frozen=True)
class _Counters:
    """What has been counted up to a token."""

    stats: CacheStats | None
    major_faults: int
    read_bytes: int | None

    @classmethod
    def of(cls, session: Session) -> _Counters:
        return cls(session.stats(), _major_faults(), _read_bytes())


def _token_counters(counters: list[_Counters]) -> TokenCounters:
    def steps(values: list[int]) -> list[int]:
        return [after - before for before, after in itertools.pairwise(values)]

    cached = [each.stats for each in counters if each.stats]
    reads = [each.read_bytes for each in counters if each.read_bytes is not None]
    return TokenCounters(
        hits=steps([stats.hits for stats in cached]) if cached else None,
        misses=steps([stats.misses for stats in cached]) if cached else None,
        bytes=steps([stats.bytes_demand + stats.bytes_prefetch for stats in cached]) if cached else None,
        stall_ns=steps([stats.stall_ns for stats in cached]) if cached else None,
        major_faults=steps([each.major_faults for each in counters]),
        read_bytes=steps(reads) if len(reads) == len(counters) else None,
    )


def _layer_counters(session: Session, n_layers: int) -> LayerCounters:
    layers = [stats for stats in map(session.stats, range(n_layers)) if stats]
    return LayerCounters(
        [stats.hits for stats in layers],
        [stats.misses for stats in layers],
        [stats.forecast_experts for stats in layers],
        [stats.forecast_used for stats in layers],
    )


def _clock_cost_ns() -> float:
    """Nanoseconds that reading the clock and keeping the value takes."""
    kept: list[int] = []
    begin = time.monotonic_ns()
    for _ in range(_CLOCK_READS):
        kept.append(time.monotonic_ns() - begin)
    return (time.monotonic_ns() - begin) / _CLOCK_READS


def _read_through(path: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _read_bytes() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def process_memory(pid: int | str) -> int:
    """Anonymous and shared bytes that a process has in memory; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def decode_in_process(
    job: Job, group: MemoryGroup | None = None, progress: Callable[[float], None] = lambda fraction: None
) -> tuple[DecodeRun, int]:
    """Run `job` in a fresh process, inside `group` where one is given.

    Returns the run and the peak of its anonymous and shared memory in bytes, sampled every 50 ms from the group, or
    from the process where there is none. Raises DecodeFailedError. The process does not outlive the call.
    """
    command = [sys.executable, "-m", "remoe_edge.measure.worker"]
    with (
        tempfile.TemporaryFile() as errors,
        child_process(
            group.command(command) if group else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        content, peak = _follow(process, job, group, progress)
        process.wait()
        if "result" in content:
            return DecodeRun.from_json(content["result"]), peak
        raise _failure(content, process.returncode, group, errors)


def _follow(
    process: subprocess.Popen[bytes], job: Job, group: MemoryGroup | None, progress: Callable[[float], None]
) -> tuple[dict[str, Any], int]:
    """Feed the process, and read what it says until it ends: its last message, and the peak of its memory."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(job)).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended early; the exit status tells
    message: dict[str, Any] = {}
    peak, unread = 0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            peak = max(peak, group.memory() if group else process_memory(process.pid))
            if not selector.select(_SAMPLE_S):
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return message, peak
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "progress" in message:
                    progress(message["progress"])


def _failure(content: dict[str, Any], status: int, group: MemoryGroup | None, errors: IO[bytes]) -> DecodeFailedError:
    if "error" in content:
        return DecodeFailedError("failed", content["error"])
    if group and group.oom_kills():
        return DecodeFailedError("killed", "the kernel killed it: it needs more memory than the limit allows")
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()[-5:]
    if status < 0:
        return DecodeFailedError("killed", "; ".join([f"ended by {signal.Signals(-status).name}", *said]))
    return DecodeFailedError("failed", "; ".join([f"ended with status {status}", *said]))


def main() -> int:
    # The process must not outlive the one that measures it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    content = json.load(sys.stdin)
    job = Job(**{**content, "cache": CacheConfig(**content["cache"]), "warm_files": tuple(content["warm_files"])})

    # Whatever a library prints must not get between our lines.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        try:
            run = decode(job, lambda fraction: send({"progress": fraction}))
        except RemoeError as error:
            send({"error": str(error)})
            return 1
        send({"result": asdict(run)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
