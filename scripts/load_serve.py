"""Many clients on a running `remoe-edge serve` for some time; prints one JSON object, exit status 1 if a promise broke.

    remoe-edge serve model.gguf --memory 1400MiB --slots 2 &
    python scripts/load_serve.py --clients 32 --seconds 600

Promised: no answer but a good one, 429 or 503; memory within the limit at every second; counters that agree with
each other. Clients chat, stream, ask for JSON, and go away in the middle of an answer; after a 429 or 503 they wait for
as long as its Retry-After says.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter

import aiohttp

SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}},
    "required": ["good"],
    "additionalProperties": False,
}
WORDS = (
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "old",
    "boats",
    "lay",
    "in",
    "harbour",
    "while",
    "rain",
    "fell",
    "on",
    "stones",
)
BY_DESIGN = (429, 503)
LAYER_METRIC = re.compile(r'^remoe_expert_cache_(\w+_total)\{layer="(\d+)"\} (\S+)$', re.MULTILINE)


class Load:
    def __init__(self, url: str, key: str | None, tokens: int, words: int = 60) -> None:
        self.url, self.tokens, self.words = url, tokens, words
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.answers: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.ttft_s: list[float] = []
        self.memory: list[float] = []
        self.limit: float | None = None
        self.inconsistent: set[str] = set()
        self.unreachable = 0
        self.last: dict[str, dict[str, float]] = {}
        self.restarts = 0.0

    async def client(self, http: aiohttp.ClientSession, seed: int, end: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            kind = rng.choice(("chat", "chat", "stream", "stream", "json", "leave"))
            body: dict[str, object] = {
                "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(4, self.words)))}],
                "max_tokens": rng.randint(1, self.tokens),
                "temperature": rng.choice((0.0, 0.8)),
                "seed": seed,
                "stream": kind in ("stream", "leave"),
            }
            if kind == "json":
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
            try:
                await self.request(http, kind, body, rng)
            except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
                self.errors[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1

    async def request(self, http: aiohttp.ClientSession, kind: str, body: object, rng: random.Random) -> None:
        begin = time.monotonic()
        async with http.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers) as answer:
            if answer.status in BY_DESIGN:
                self.answers[str(answer.status)] += 1
                assert "message" in (await answer.json())["error"]
                await asyncio.sleep(float(answer.headers.get("Retry-After", 1)) * rng.uniform(0.5, 1.5))
                return
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.text())[:120]}")
            if kind in ("stream", "leave"):
                left = rng.randint(1, 3) if kind == "leave" else -1
                done = False
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    if left == 0:
                        self.answers["left"] += 1
                        return
                    left -= 1
                    done = line.startswith(b"data: [DONE]")
                    if not done and "error" in (event := json.loads(line[6:])):
                        raise ValueError(f"in the stream: {event['error']['message'][:120]}")
                    if left < 0 and not done and len(self.ttft_s) < 1_000_000:
                        self.ttft_s.append(time.monotonic() - begin)
                        left = -1_000_000_000
                if not done and left < 0:
                    raise ValueError("a stream without its end")
            else:
                choice = (await answer.json())["choices"][0]
                if kind == "json" and choice["finish_reason"] == "stop":
                    json.loads(choice["message"]["content"])
            self.answers[kind] += 1

    async def watch(self, http: aiohttp.ClientSession, end: float) -> None:
        while time.monotonic() < end:
            await self.look(http)
            await asyncio.sleep(1)

    async def look(self, http: aiohttp.ClientSession) -> None:
        try:
            async with http.get(f"{self.url}/metrics", headers=self.headers) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, asyncio.TimeoutError):
            self.unreachable += 1
            return
        self.memory.append(sum(float(v) for v in re.findall(r"^remoe_memory_bytes\{.*\} (\S+)$", text, re.MULTILINE)))
        if found := re.search(r"^remoe_memory_limit_bytes (\S+)$", text, re.MULTILINE):
            self.limit = float(found[1])
        restarts = float(re.search(r"^remoe_restarts_total (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
        layers: dict[str, dict[str, float]] = {}
        for name, layer, value in LAYER_METRIC.findall(text):
            layers.setdefault(layer, {})[name] = float(value)
        self.check(layers, restarted=restarts != self.restarts)
        self.restarts = restarts

    def check(self, layers: dict[str, dict[str, float]], *, restarted: bool) -> None:
        for layer, now in layers.items():
            before = self.last.get(layer, {})
            if not restarted and any(now[name] < value for name, value in before.items()):
                self.inconsistent.add(f"layer {layer}: a counter fell")
            if now["hits_total"] + now["misses_total"] < now["calls_total"]:
                self.inconsistent.add(f"layer {layer}: fewer look-ups than evaluations")
            if now["evictions_total"] > now["misses_total"] + now["reads_total"]:
                self.inconsistent.add(f"layer {layer}: more evictions than experts that came")
            # Bytes without misses are possible: an expert that is being loaded ahead of all calls has its slot already.
            if now["misses_total"] > 0 and now["bytes_demand_total"] == 0:
                self.inconsistent.add(f"layer {layer}: misses without bytes")
        if layers:
            self.last = layers

    def summary(self, clients: int, seconds: float) -> dict[str, object]:
        peak = max(self.memory, default=0.0)
        good = sum(count for name, count in self.answers.items() if not name.isdigit())
        hits, misses = (sum(layer[name] for layer in self.last.values()) for name in ("hits_total", "misses_total"))
        ok = not self.errors and not self.inconsistent and not self.unreachable and good > 0
        return {
            "ok": ok and (self.limit is None or peak <= self.limit),
            "clients": clients,
            "seconds": round(seconds, 1),
            "answers": dict(self.answers),
            "good_per_s": round(good / seconds, 2),
            "errors": dict(self.errors),
            "ttft_s_p50": round(statistics.median(self.ttft_s), 3) if self.ttft_s else None,
            "memory_samples": len(self.memory),
            "memory_peak_bytes": int(peak),
            "memory_limit_bytes": None if self.limit is None else int(self.limit),
            "hits": int(hits),
            "misses": int(misses),
            "inconsistent": sorted(self.inconsistent),
            "metrics_unreachable": self.unreachable,
            "restarts": int(self.restarts),
        }


async def run(args: argparse.Namespace) -> dict[str, object]:
    load = Load(args.url.rstrip("/"), os.environ.get("LLAMA_API_KEY"), args.tokens)
    return await apply(load, args.clients, args.seconds, args.patience)


async def apply(load: Load, clients: int, seconds: float, patience: float, first_seed: int = 0) -> dict[str, object]:
    begin = time.monotonic()
    end = begin + seconds
    timeout = aiohttp.ClientTimeout(total=patience)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        await load.look(http)
        watch = asyncio.create_task(load.watch(http, end))
        await asyncio.gather(*(load.client(http, first_seed + seed, end) for seed in range(clients)))
        await watch
        seconds = time.monotonic() - begin
        await load.look(http)
    return load.summary(clients, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--patience", type=float, default=300, help="seconds that a client waits for an answer")
    summary = asyncio.run(run(parser.parse_args()))
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
