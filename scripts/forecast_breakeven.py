"""From which precision on does reading ahead pay? TPOT against the precision of a forecast made worse on purpose.

    python scripts/forecast_breakeven.py olmoe-twin.gguf --budget 880MiB -t 2 -r 5

In a twin the forecast of the next layer is right; a share of it is replaced by other experts that are in no slot
(LLAMA_EXPERT_TEST_FORECAST_WRONG, for this test only). Arms take turns, every other time in reverse; ratios are between
runs of the same repetition. Nothing else should run on the machine: times are what is measured.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from remoe_edge.runtime.llama import CacheConfig, CacheStats, open_model

WRONG = "LLAMA_EXPERT_TEST_FORECAST_WRONG"


def run(model: Path, budget: str, threads: int, tokens: int, prefetch: str, wrong: float) -> tuple[float, CacheStats]:
    """TPOT in milliseconds of one decode, and the counters after its first token."""
    os.environ[WRONG] = str(wrong)
    with open_model(model, CacheConfig(budget, prefetch=prefetch), n_ctx=tokens + 16, n_threads=threads) as session:
        session.decode(session.tokenize("w00000"))
        moments = []
        for index, _ in enumerate(session.generate(tokens)):
            moments.append(time.monotonic_ns())
            if index == 0:
                session.reset_stats()
        stats = session.stats()
    assert stats is not None
    return (moments[-1] - moments[0]) / (len(moments) - 1) / 1e6, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="880MiB")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", "--tokens", type=int, default=56)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--precision", type=float, nargs="*", default=[1.0, 0.9, 0.8, 0.6, 0.4])
    args = parser.parse_args()
    arms = [("off", 0.0), *(("router", 1 - precision) for precision in args.precision)]
    arms += [("auto", 0.0), ("auto", 1 - min(args.precision))]
    times: list[list[float]] = [[] for _ in arms]
    last: list[CacheStats | None] = [None] * len(arms)
    run(args.model, args.budget, args.threads, 8, "off", 0.0)
    for repetition in range(args.repetitions):
        order = range(len(arms))
        for index in order if repetition % 2 == 0 else reversed(order):
            tpot, last[index] = run(args.model, args.budget, args.threads, args.tokens, *arms[index])
            times[index].append(tpot)
    print("prefetch  wrong  precision   TPOT ms (all)   ratio to off [95 %]   MB per token needed, wasted")
    random = np.random.default_rng(0)
    base, points = np.array(times[0]), []
    for (prefetch, wrong), own, stats in zip(arms, times, last, strict=True):
        assert stats is not None
        ratios = np.array(own) / base
        low, high = np.percentile(np.median(random.choice(ratios, (4000, len(ratios))), 1), (2.5, 97.5))
        precision = stats.forecast_precision
        if prefetch == "router" and precision is not None:
            points.append((precision, float(np.median(ratios))))
        wasted = stats.bytes_prefetch - stats.bytes_prefetch_used
        print(
            f"{prefetch:8} {wrong:6.2f} {'' if precision is None else f'{precision:10.3f}':>10}  {np.median(own):7.1f}"
            f" ({', '.join(f'{value:.1f}' for value in own)})   {np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
            f"   {(stats.bytes_demand + stats.bytes_prefetch_used) / (args.tokens - 1) / 1e6:.0f},"
            f" {wasted / (args.tokens - 1) / 1e6:.0f}"
        )
    if len(points) > 1:
        slope, start = np.polyfit(*zip(*points, strict=True), 1)
        print(f"a line through the medians crosses 1 at a precision of {(1 - start) / slope:.2f}")


if __name__ == "__main__":
    main()
