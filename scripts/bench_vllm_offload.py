"""Decode a base and a tuned checkpoint with vLLM and CPU offload: throughput and TPOT, interleaved.

ReMoE's second platform (arXiv 2605.27081) is vLLM with weights in host memory. This starts `vllm serve` for one
checkpoint after the other, A B B A, sends prompts one at a time (batch 1) and writes a row per run. Run it where vLLM
and a GPU are:

    remoe-edge tune MODEL --data chats.jsonl -o router.safetensors --export-hf tuned
    python scripts/bench_vllm_offload.py MODEL tuned --cpu-offload-gb 20 --workload gsm8k -n 128 -o vllm.jsonl

What follows `--` goes to `vllm serve`, such as `-- --max-model-len 4096 --enforce-eager`.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.measure.stats import Ratio, bootstrap_ci95, paired_ratio
from remoe_edge.measure.workloads import Prompt, load_workload
from remoe_edge.progress import Report, silent, stderr_progress

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Completion:
    """One streamed answer; times in milliseconds from the request on.

    `tpot_ms` = (end - first token) / (n_gen - 1), None for fewer than two tokens. `n_gen` is the server's own count: a
    piece of the stream may hold several tokens, and then gaps between pieces are longer than those between tokens.
    """

    n_prompt: int
    n_gen: int
    ttft_ms: float
    total_ms: float
    tpot_ms: float | None
    gaps_ms: list[float]
    text: str


def parse_stream(lines: Iterable[bytes], clock: Any, begin: float) -> Completion:
    """An answer of `/v1/completions` with `stream` and `include_usage`, as server-sent events.

    `clock` gives seconds. Raises RemoeError for the server's errors and for a stream without tokens or usage.
    """
    times: list[float] = []
    text, usage, done = "", None, False
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RemoeError(f"vLLM sent what is not JSON: {data[:200]!r}") from error
        if "error" in event:
            raise RemoeError(f"vLLM: {event['error']}")
        pieces = [choice.get("text") or "" for choice in event.get("choices") or ()]
        if any(pieces):
            times.append(clock())
            text += "".join(pieces)
        usage = event.get("usage") or usage
    if not done or not times or usage is None:
        raise RemoeError("vLLM's stream ended before its end, its first token or its usage; look at the server's log")
    n_gen = int(usage["completion_tokens"])
    total = times[-1] - begin
    return Completion(
        n_prompt=int(usage["prompt_tokens"]),
        n_gen=n_gen,
        ttft_ms=(times[0] - begin) * 1e3,
        total_ms=total * 1e3,
        tpot_ms=(times[-1] - times[0]) / (n_gen - 1) * 1e3 if n_gen > 1 else None,
        gaps_ms=[(b - a) * 1e3 for a, b in pairwise(times)],
        text=text,
    )


def complete(port: int, model: str, prompt: str, n_gen: int, timeout: float) -> Completion:
    """Exactly `n_gen` greedy tokens after a prompt."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": n_gen,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RemoeError(f"vLLM answered {answer.status}: {answer.read(500).decode(errors='replace')}")
        return parse_stream(answer, time.perf_counter, begin)
    except (OSError, http.client.HTTPException) as error:
        raise RemoeError(f"vLLM's server does not answer: {error}") from error
    finally:
        connection.close()


@contextmanager
def serve(
    vllm: str, model: str, offload_gb: float, extra: Sequence[str], log: Path, start_timeout: float
) -> Iterator[int]:
    """A running `vllm serve`; its port. Its process group ends with the context."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    command = [vllm, "serve", model, "--host", HOST, "--port", str(port), "--cpu-offload-gb", str(offload_gb)]
    command += ["--max-num-seqs", "1", "--served-model-name", model, *extra]
    with open(log, "ab") as output:
        try:
            server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        except OSError as error:
            raise RemoeError(
                f"{vllm} cannot be started: {error.strerror}; install vLLM, or name it with --vllm"
            ) from error
        try:
            _wait(server, port, log, start_timeout)
            yield port
        finally:
            _end(server)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RemoeError(
                f"vllm serve ended with status {server.returncode}: {''.join(last)} (all of it is in {log})"
            )
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RemoeError(f"vllm serve was not ready after {timeout:.0f} s; see {log}, or give more with --start-timeout")


def _end(server: subprocess.Popen[bytes]) -> None:
    # vLLM computes in children of its own.
    for number, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        with suppress(subprocess.TimeoutExpired):
            server.wait(patience)


def measure(
    models: dict[str, str],
    prompts: Sequence[Prompt],
    *,
    n_gen: int,
    offload_gb: float,
    repetitions: int,
    log: Path,
    vllm: str = "vllm",
    extra: Sequence[str] = (),
    start_timeout: float = 1800.0,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Rows, one per repetition and model in the order in which they ran; every second round goes backwards.

    The first prompt of a server is answered once before, and that does not count. Raises RemoeError if vLLM fails.
    """
    common = {"cpu_offload_gb": offload_gb, "n_gen": n_gen, "vllm": _version(vllm), "gpu": _gpu(), "extra": list(extra)}
    rows = []
    runs = [(r, arm) for r in range(repetitions) for arm in (list(models) if r % 2 == 0 else reversed(list(models)))]
    for index, (repetition, arm) in enumerate(runs):
        report(f"{arm}: starting vLLM", index / len(runs))
        with serve(vllm, models[arm], offload_gb, extra, log, start_timeout) as port:
            complete(port, models[arm], prompts[0].text, min(n_gen, 8), start_timeout)
            answers = []
            for place, prompt in enumerate(prompts):
                report(f"{arm}: {prompt.name}", (index + place / len(prompts)) / len(runs))
                answers.append((prompt.name, complete(port, models[arm], prompt.text, n_gen, start_timeout)))
        rows.append({"arm": arm, "model_path": models[arm], "repetition": repetition, **common, **_figures(answers)})
    return rows


def _figures(answers: Sequence[tuple[str, Completion]]) -> dict[str, Any]:
    tpots = [answer.tpot_ms for _, answer in answers if answer.tpot_ms is not None]
    gaps = [gap for _, answer in answers for gap in answer.gaps_ms]
    seconds = sum(answer.total_ms for _, answer in answers) / 1e3
    percentiles = np.percentile(gaps, (50, 95, 99)).tolist() if gaps else [None] * 3
    return {
        "requests": len(answers),
        "ttft_ms": median(answer.ttft_ms for _, answer in answers),
        "tpot_ms": median(tpots) if tpots else None,
        "tpot_ms_ci95": bootstrap_ci95(tpots),
        **{f"itl_ms_p{p}": value for p, value in zip((50, 95, 99), percentiles, strict=True)},
        "output_tokens_per_s": sum(answer.n_gen for _, answer in answers) / seconds,
        "answers": [{"prompt": name, **asdict(answer)} for name, answer in answers],
    }


def tpot_ratio(rows: Sequence[dict[str, Any]], one: str, other: str) -> Ratio | None:
    """TPOT of `one` over that of `other`, paired by repetition and prompt."""
    found: dict[str, dict[Any, float]] = {one: {}, other: {}}
    for row in rows:
        for answer in row["answers"]:
            if answer["tpot_ms"] is not None:
                found[row["arm"]][row["repetition"], answer["prompt"]] = answer["tpot_ms"]
    return paired_ratio(found[one], found[other])


def _version(vllm: str) -> str | None:
    try:
        done = subprocess.run([vllm, "--version"], capture_output=True, text=True, timeout=300, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else None


def _gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base")
@click.argument("tuned")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--cpu-offload-gb", "offload_gb", type=click.FloatRange(min=0), required=True, help="GiB of weights in host memory."
)
@click.option(
    "--workload", default="gsm8k", show_default=True, help="gsm8k, humaneval, mt-bench, text or a JSONL file."
)
@click.option("--prompts", "limit", type=click.IntRange(min=1), default=16, show_default=True, help="At most so many.")
@click.option("-n", "--n-gen", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens of an answer.")
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=2, show_default=True, help="Servers of each model."
)
@click.option("--vllm", default="vllm", show_default=True, help="The program.")
@click.option("--start-timeout", type=click.FloatRange(min=1), default=1800.0, show_default=True, help="Seconds.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Rows, JSON Lines.")
@click.option("--force", is_flag=True, help="Overwrite OUTPUT.")
def main(
    base: str,
    tuned: str,
    extra: tuple[str, ...],
    offload_gb: float,
    workload: str,
    limit: int,
    n_gen: int,
    repetitions: int,
    vllm: str,
    start_timeout: float,
    output: Path,
    force: bool,
) -> None:
    """Decode BASE and TUNED, checkpoint folders, with vLLM and CPU offload; EXTRA goes to `vllm serve`."""
    refuse_existing(output, force)
    prompts = load_workload(workload, limit).prompts
    log = output.with_name(output.name + ".log")
    with stderr_progress() as report:
        rows = measure(
            {"base": base, "tuned": tuned},
            prompts,
            n_gen=n_gen,
            offload_gb=offload_gb,
            repetitions=repetitions,
            log=log,
            vllm=vllm,
            extra=extra,
            start_timeout=start_timeout,
            report=report,
        )
    with atomic_output(output, force=force) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        click.echo(
            f"{row['arm']:6} TPOT {row['tpot_ms']:.2f} ms, TTFT {row['ttft_ms']:.0f} ms, "
            f"{row['output_tokens_per_s']:.2f} tokens/s"
        )
    ratio = tpot_ratio(rows, "tuned", "base")
    if ratio:
        interval = f" (95 % interval {ratio.ci95[0]:.3f} to {ratio.ci95[1]:.3f})" if ratio.ci95 else ""
        click.echo(f"TPOT tuned / base {ratio.ratio:.3f}{interval}, {ratio.pairs} pairs")


if __name__ == "__main__":
    try:
        main()
    except RemoeError as error:
        sys.exit(f"Error: {error}")
