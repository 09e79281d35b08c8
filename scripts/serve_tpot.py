"""Does the server cost time? TPOT of one client through `remoe-edge serve` beside that of `remoe-edge bench`.

    python scripts/serve_tpot.py twin.gguf --budget 880MiB --prompt w00000

Both decode greedily with the same budget, threads and kernels, in turns. Prints one JSON object: both medians, their
ratio, and the time from the start of the server to its first token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

REMOE = [sys.executable, "-m", "remoe_edge"]


def through_server(args: argparse.Namespace) -> tuple[list[float], float]:
    """TPOT of each repetition in ms, and seconds to the first token of the first one."""
    begin = time.monotonic()
    command = [*REMOE, "serve", args.model, "--port", "0", "--json", "--slots", "1", "--repack", "on"]
    command += [
        "--expert-cache",
        args.budget,
        "--ctx",
        str(args.tokens + 64),
        *(["-t", str(args.threads)] if args.threads else []),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        answers = []
        for _ in range(args.repetitions):
            asked = time.monotonic()
            answers.append(ask(url, args))
            if len(answers) == 1:
                first_s = asked - begin + answers[0]["timings"]["prompt_ms"] / 1e3
        process.terminate()
    return [answer["timings"]["predicted_ms"] / (args.tokens - 1) for answer in answers], first_s


def ask(url: str, args: argparse.Namespace) -> Any:
    body = {"prompt": args.prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    body["cache_prompt"] = False
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def through_bench(args: argparse.Namespace) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [*REMOE, "bench", args.model, "--budget", args.budget, "-p", args.prompt, "-n", str(args.tokens)]
        command += [
            "--repack",
            "-r",
            str(args.repetitions),
            "--cool-down",
            "0",
            "--page-cache",
            "warm",
            "-o",
            str(rows),
        ]
        command += ["-t", str(args.threads)] if args.threads else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return [json.loads(line)["tpot_ms"] for line in rows.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", required=True)
    parser.add_argument("--prompt", default="w00000")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    bench, (served, first_s), again = through_bench(args), through_server(args), through_bench(args)
    medians = statistics.median(served), statistics.median([*bench, *again])
    print(
        json.dumps(
            {
                "tpot_ms_serve": round(medians[0], 3),
                "tpot_ms_bench": round(medians[1], 3),
                "ratio": round(medians[0] / medians[1], 4),
                "start_to_first_token_s": round(first_s, 3),
                "serve_repetitions_ms": served,
                "bench_ms": [bench, again],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
