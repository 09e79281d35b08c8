"""A server under the smallest memory limit that works, loaded for hours: no growth, no kill, counters that agree.

    python scripts/soak.py demo -o soak.jsonl --seconds 7200            # at one go
    python scripts/soak.py demo -o soak.jsonl --seconds 80 --keep       # in parts; the server stays for the next
    python scripts/soak.py demo -o soak.jsonl --seconds 80              # the last part
    python scripts/soak.py --summary -o soak.jsonl

Requests are those of load_serve.py (chats, streams, JSON, clients that go away), with prompts of all lengths that the
context holds. Every second a line with the memory of the control group that llama-server runs in, of the front, and the
counters goes to the file. The summary fits a line to the means of blocks of time, with an intercept for each server:
memory must not grow. Without --memory the smallest limit that `serve` accepts is looked for.

Prints the summary as one JSON object; exit status 1 if a promise broke.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from load_serve import Load, apply

from remoe_edge.errors import RemoeError
from remoe_edge.files import append_line
from remoe_edge.measure.cgroup import MemoryGroup

MIB = 1 << 20
TOLERANCE = MIB
"""Growth in bytes per hour that is no leak: 24 MiB a day would be seen by the limit, and is not by this test."""
_CGROUPS = Path("/sys/fs/cgroup")
# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def group_of(pid: int) -> MemoryGroup | None:
    """The memory group of a process that `serve` limited; None if it made none."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount, version in (_CGROUPS / "memory", 1), (_CGROUPS, 2):
            # Inside a container the path may begin with groups that are not seen here.
            for folder in (mount / path.lstrip("/"), mount / Path(path).name):
                of_memory = "memory" in controllers.split(",") if version == 1 else not controllers
                if of_memory and "remoe-edge-" in folder.name and folder.is_dir():
                    return MemoryGroup(folder, version)
    return None


def smallest_memory(serve: Sequence[str]) -> int:
    """Whole MiB: the least that `serve` accepts; it names it when it gets too little."""
    command = [*serve, "--memory", "1MiB", "--dry-run"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    named = re.search(r"is not enough .* give --memory (\d+)MiB", done.stderr)
    if named is None:
        raise RemoeError(done.stderr.strip())
    return int(named[1])


class Soak(Load):
    """A load that writes down a sample every second."""

    def __init__(self, file: Any, server: dict[str, Any], part: int, tokens: int, words: int) -> None:
        super().__init__(server["url"], os.environ.get("LLAMA_API_KEY"), tokens, words)
        self.file, self.part, self.pid = file, part, server["pid"]

    async def look(self, http: aiohttp.ClientSession) -> None:
        await super().look(http)
        model = model_process(self.pid)
        group = group_of(model) if model else None
        layers = self.last.values()
        sample = {
            "sample": time.time(),
            "server": self.pid,
            "part": self.part,
            "model": model,
            "memory": self.memory[-1] if self.memory else None,
            "group": group.memory() if group else None,
            "oom_kills": group.oom_kills() if group else None,
            "restarts": self.restarts,
            **{name: sum(layer[f"{name}_total"] for layer in layers) for name in ("hits", "misses", "evictions")},
        }
        append_line(self.file, sample)


def model_process(server: int) -> int | None:
    try:
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        names = {int(child): Path(f"/proc/{child}/comm").read_text() for child in children}
    except OSError:
        return None
    return next((pid for pid, name in names.items() if name.startswith("llama-server")), None)


def start(serve: Sequence[str], memory: int, log: Path) -> dict[str, Any]:
    """A server that outlives this process, once it is ready."""
    command = [*serve, "--memory", f"{memory}MiB", "--port", "0", "--json"]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RemoeError(f"{' '.join(command)} did not start: {log.read_text().splitlines()[-1]}")
    ready = json.loads(line)
    return {"server": ready["pid"], "pid": ready["pid"], "url": ready["url"], "ready": ready, "command": command}


def is_running(server: dict[str, Any]) -> bool:
    command = Path(f"/proc/{server['pid']}/cmdline")
    return command.exists() and command.read_bytes().split(b"\0")[:-1] == [part.encode() for part in server["command"]]


def stop(server: dict[str, Any]) -> int | None:
    """End the server; its exit status where this process is its parent."""
    os.kill(server["pid"], signal.SIGTERM)
    for _ in range(300):
        try:
            pid, status = os.waitpid(server["pid"], os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            if not is_running(server):
                return None
        time.sleep(0.1)
    raise RemoeError(f"the server, process {server['pid']}, did not end within 30 s of SIGTERM")


def slope(samples: Sequence[Sequence[tuple[float, float]]], block: float) -> dict[str, float | int] | None:
    """Change per second of values at times, one sequence for each server, with its 95 % interval.

    Least squares over the means of blocks of `block` seconds, with an intercept for each sequence: neighbouring seconds
    are not independent, blocks nearly are. None for too few blocks.
    """
    times, values, groups = [], [], 0
    for sequence in samples:
        blocks: dict[int, list[tuple[float, float]]] = {}
        for time_, value in sequence:
            blocks.setdefault(int((time_ - sequence[0][0]) // block), []).append((time_, value))
        means = np.array([np.mean(each, axis=0) for each in blocks.values()])
        if len(means) > 1:
            times.append(means[:, 0] - means[:, 0].mean())
            values.append(means[:, 1] - means[:, 1].mean())
            groups += 1
    if sum(map(len, times)) - groups < 2:
        return None
    x, y = np.concatenate(times), np.concatenate(values)
    b = float(x @ y / (x @ x))
    freedom = len(x) - groups - 1
    error = math.sqrt(float(((y - b * x) ** 2).sum()) / freedom / float(x @ x))
    t = _T[freedom - 1] if freedom <= len(_T) else 2.1 if freedom < 40 else 2.0
    return {"slope": b, "low": b - t * error, "high": b + t * error, "blocks": len(x)}


def summary(lines: Sequence[dict[str, Any]], warm_up: float, block: float) -> dict[str, Any]:
    """What all parts say together. Time counts while there was load: pauses between parts are left out."""
    parts = [line for line in lines if "answers" in line]
    samples = [line for line in lines if "sample" in line and line["memory"] is not None]
    limits = {line["server"]: line["memory"] for line in lines if "ready" in line}
    loaded: dict[int, list[tuple[float, float]]] = {}
    busy: Counter[int] = Counter()
    before: dict[int, dict[str, Any]] = {}
    fell = []
    for sample in samples:
        server, last = sample["server"], before.get(sample["server"])
        if last and last["part"] == sample["part"]:
            busy[server] += sample["sample"] - last["sample"]
        if last and last["restarts"] == sample["restarts"]:
            fell += [name for name in ("hits", "misses", "evictions") if sample[name] < last[name]]
        before[server] = sample
        if busy[server] >= warm_up:
            loaded.setdefault(server, []).append((busy[server], sample["memory"]))
    fit = slope(list(loaded.values()), block)
    hour = {name: round(fit[name] * 3600) for name in ("slope", "low", "high")} if fit else None
    answers: Counter[str] = Counter()
    for part in parts:
        answers.update(part["answers"])
    oom_kills = max((sample["oom_kills"] or 0 for sample in samples), default=0)
    restarts = sum(sample["restarts"] for sample in before.values())
    within = all(sample["memory"] <= limits[sample["server"]] for sample in samples)
    good = bool(parts) and all(part["ok"] for part in parts)
    grows = hour is not None and hour["low"] > 0 and hour["slope"] > TOLERANCE
    return {
        "ok": good and within and not (grows or fell or oom_kills or restarts),
        "parts": len(parts),
        "servers": len(before),
        "loaded_seconds": round(sum(busy.values())),
        "answers": dict(answers),
        "memory_limit_bytes": max(limits.values(), default=None),
        "memory_peak_bytes": max((sample["memory"] for sample in samples), default=None),
        "group_peak_bytes": max((sample["group"] or 0 for sample in samples), default=None),
        "limited": all(sample["group"] is not None for sample in samples),
        "growth_bytes_per_hour": hour,
        "growth_blocks": fit["blocks"] if fit else 0,
        "warm_up_seconds": warm_up,
        "oom_kills": oom_kills,
        "restarts": int(restarts),
        "counters_fell": sorted(set(fell)),
        "failed_parts": [part for part in parts if not part["ok"]],
        "hits": int(sum(sample["hits"] for sample in before.values())),
        "misses": int(sum(sample["misses"] for sample in before.values())),
        "evictions": int(sum(sample["evictions"] for sample in before.values())),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may end in a part of one."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def run(args: argparse.Namespace) -> None:
    lines = read(args.output)
    servers = [line for line in lines if "ready" in line]
    server = servers[-1] if servers and is_running(servers[-1]) else None
    with args.output.open("ab") as file:
        if lines or file.tell() == 0:
            file.truncate(args.output.read_bytes().rfind(b"\n") + 1)
        if server is None:
            serve = [sys.executable, "-m", "remoe_edge", "serve", args.model, "-t", str(args.threads)]
            serve += ["--slots", str(args.slots), "--ctx", str(args.ctx), "--power", "none"]
            memory = args.memory or smallest_memory(serve)
            server = {**start(serve, memory, args.output.with_suffix(".log")), "memory": memory * MIB}
            append_line(file, server)
        part = sum("answers" in line for line in lines)
        # About two tokens for a word of these, and room for the answer.
        words = args.words or max(5, (args.ctx - args.tokens - 40) // 2)
        load = Soak(file, server, part, args.tokens, words)
        try:
            done = asyncio.run(apply(load, args.clients, args.seconds, args.patience, first_seed=1000 * part))
            append_line(file, {"part": part, "ended": time.time(), **done})
        finally:
            if not args.keep:
                stop(server)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="GGUF, or demo")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON lines; what is there is gone on with")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--memory", type=int, metavar="MIB", help="default: the least that is accepted")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=512, help="tokens of a slot")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument(
        "--words", type=int, help="longest prompt; default: what the context holds at two tokens a word"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=300, help="seconds that a client waits for an answer")
    # In their first hour allocators take 4 MB in steps that get rarer: docs/reliability.md.
    parser.add_argument("--warm-up", type=float, default=3600, help="seconds of load that do not count for growth")
    parser.add_argument("--block", type=float, default=20, help="seconds of a mean that counts for growth")
    parser.add_argument("--keep", action="store_true", help="leave the server running for the next part")
    parser.add_argument("--summary", action="store_true", help="only sum up what is in the file")
    args = parser.parse_args()
    try:
        if not args.summary:
            run(args)
    except RemoeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    found = summary(read(args.output), args.warm_up, args.block)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
