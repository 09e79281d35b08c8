"""One decode run in a process of its own: ``python -m remoe_edge.measure.worker``.

The process takes a `Job` as JSON on stdin and writes lines of JSON on stdout: ``{"progress": 0.5}`` now and then, at
the end ``{"result": ...}`` or ``{"error": "..."}``. `decode_in_process` is the other side of it.

Decoding is greedy, and the end-of-generation token does not end it, so that all runs of a prompt have equal lengths.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from remoe_edge.errors import RemoeError
from remoe_edge.measure.cgroup import MemoryGroup
from remoe_edge.runtime.llama import CacheConfig, CacheInfo, CacheStats, Session, load_model

_SAMPLE_S = 0.05
_PROGRESS_NS = 500_000_000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What to decode, and how. `cache.budget` "off" is stock behaviour."""

    model: str
    prompt: str
    n_gen: int
    n_threads: int
    cache: CacheConfig
    mmap: bool
    repack: bool
    n_batch: int = 512
    n_ubatch: int = 512


@dataclass(frozen=True)
class DecodeRun:
    """What one decode run did. Times in nanoseconds, sizes in bytes.

    Attributes
    ----------
    token_ns
        When each token was chosen, from the start of the prompt's evaluation; the first is the TTFT. The clock stands
        still while logits are hashed.
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

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DecodeRun:
        nested = {"prefill": CacheStats, "decode": CacheStats, "info": CacheInfo}
        parts = {key: kind(**content[key]) if content[key] is not None else None for key, kind in nested.items()}
        return cls(**{**content, **parts})


class DecodeFailedError(RemoeError):
    """A decode run ended without a result. `status` is "failed", or "killed" where a signal ended it."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode(job: Job, progress: Callable[[float], None] = lambda fraction: None) -> DecodeRun:
    """Load the model, evaluate the prompt and generate `n_gen` tokens, in this process."""
    memory = {"start": process_memory("self")}
    path = Path(job.model)
    with load_model(path, job.cache, mmap=job.mmap, repack=job.repack) as model:
        memory["loaded"] = process_memory("self")
        prompt = model.tokenize(job.prompt)
        if not prompt:
            raise RemoeError("the prompt is empty; give some text")
        n_ctx = len(prompt) + job.n_gen
        with model.session(n_ctx=n_ctx, n_batch=job.n_batch, n_ubatch=job.n_ubatch, n_threads=job.n_threads) as session:
            memory["ready"] = process_memory("self")
            return _generate(session, prompt, job.n_gen, memory, progress)


def _generate(
    session: Session, prompt: list[int], n_gen: int, memory: dict[str, int], progress: Callable[[float], None]
) -> DecodeRun:
    tokens: list[int] = []
    token_ns: list[int] = []
    logits_hash = hashlib.sha256()
    reported = begin = time.monotonic_ns()
    session.decode(prompt)
    for token in session.generate(n_gen):
        now = time.monotonic_ns()
        tokens.append(token)
        token_ns.append(now - begin)
        logits_hash.update(session.logits().tobytes())
        if len(tokens) == 1:
            prefill = session.stats()
            session.reset_stats()
            faults, read = _major_faults(), _read_bytes()
        if now - reported > _PROGRESS_NS:
            reported = now
            progress(len(tokens) / n_gen)
        begin += time.monotonic_ns() - now
    end_read = _read_bytes()
    memory["end"] = process_memory("self")
    return DecodeRun(
        n_prompt=len(prompt),
        n_gen=n_gen,
        token_ns=token_ns,
        prefill=prefill,
        decode=session.stats(),
        major_faults=_major_faults() - faults,
        read_bytes=None if read is None or end_read is None else end_read - read,
        output_sha256=hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest(),
        logits_sha256=logits_hash.hexdigest(),
        text=session.detokenize(tokens),
        info=session.info(),
        kernels=session.kernels,
        model_description=session.description,
        model_bytes=session.n_bytes,
        model_params=session.n_params,
        memory=memory,
    )


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
        subprocess.Popen(
            group.command(command) if group else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ctrl-C at a terminal is for this process alone, which then ends the other.
            start_new_session=True,
        ) as process,
    ):
        try:
            content, peak = _follow(process, job, group, progress)
            process.wait()
        finally:
            process.kill()
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
    job = Job(**{**content, "cache": CacheConfig(**content["cache"])})

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
