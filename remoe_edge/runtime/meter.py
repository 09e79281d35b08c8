"""What a generation took: when each token came, and what the expert cache did after the first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from remoe_edge.runtime.llama import CacheInfo, CacheStats, Session
from remoe_edge.sizes import format_size

Summary = dict[str, Any]


class Meter:
    """Watches one generation; made right before its prompt is evaluated."""

    def __init__(self, session: Session) -> None:
        self.times_ns: list[int] = []
        """CLOCK_MONOTONIC at each token."""
        self._session = session
        self._start_ns = time.monotonic_ns()
        self._first: CacheStats | None = None

    def follow(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens, up to the one that ends the generation."""
        for token in tokens:
            self.times_ns.append(time.monotonic_ns())
            if len(self.times_ns) == 1:
                self._first = self._session.stats()
            if self._session.is_end(token):
                return
            yield token

    def summary(self) -> Summary:
        """Fields named as in a benchmark's row; None where there was nothing to measure. `cache` is a `CacheInfo`."""
        times, steps = self.times_ns, len(self.times_ns) - 1
        info, last = self._session.info(), self._session.stats()
        stats = difference(last, self._first) if last and self._first and steps > 0 else None
        tpot = (times[-1] - times[0]) / steps / 1e6 if steps > 0 else None
        return {
            "n_gen": len(times),
            "ttft_ms": (times[0] - self._start_ns) / 1e6 if times else None,
            "tpot_ms": tpot,
            "tokens_per_s": 1e3 / tpot if tpot else None,
            "kernels": self._session.kernels,
            "route_bias": info.route_bias if info else None,
            "route_keep": info.route_keep if info else None,
            "cache": asdict(info) if info else None,
            "hit_rate": stats.hit_rate if stats else None,
            "bytes_per_token": (stats.bytes_demand + stats.bytes_prefetch) / steps if stats else None,
            "stall_ms_per_token": stats.stall_ns / 1e6 / steps if stats else None,
            "reads_wrong": last.reads_wrong if last and info and info.verify else None,
        }


def difference(later: CacheStats, earlier: CacheStats) -> CacheStats:
    """What was counted between two readings."""
    return CacheStats(
        **{field.name: getattr(later, field.name) - getattr(earlier, field.name) for field in fields(CacheStats)}
    )


def summary_text(summary: Summary) -> str:
    """A summary, with `n_prompt`, for people."""
    lines = [f"{summary['n_prompt']} tokens of prompt, {summary['n_gen']} generated"]
    if summary["ttft_ms"] is not None:
        lines[0] += f"; TTFT {summary['ttft_ms']:.0f} ms"
    if summary["tpot_ms"] is not None:
        lines[0] += f", TPOT {summary['tpot_ms']:.1f} ms = (last - first token) / (n - 1)"
    lines.append(cache_text(CacheInfo(**summary["cache"]) if summary["cache"] else None, summary["kernels"]))
    if summary["hit_rate"] is not None:
        lines.append(
            f"after the first token: {summary['hit_rate']:.1%} hits, {summary['bytes_per_token'] / 1e6:.1f} MB read "
            f"and {summary['stall_ms_per_token']:.1f} ms stalled per token"
        )
    if summary["reads_wrong"]:
        lines.append(f"{summary['reads_wrong']} reads gave wrong bytes and were made once more: look at the storage")
    return "\n".join(lines)


def cache_text(info: CacheInfo | None, kernels: str) -> str:
    """How the experts are held, for people."""
    if info is None:
        return f"no expert cache; {kernels} kernels"
    lossy = (
        f"\nLOSSY: route bias {info.route_bias:g} preferred experts in the cache, the router's first {info.route_keep} "
        "stayed; the output is not the model's own"
        if info.route_bias is not None
        else ""
    )
    start = {
        "": "",
        "loaded": f"\nwarm start: {format_size(info.bytes_loaded)} of the last run's experts",
        "all experts fit": "\nthe hot set is not needed: all experts fit",
    }.get(info.warm, f"\ncold start, the hot set was not used: {info.warm}")
    return (
        f"expert cache: {format_size(info.used)} of {format_size(info.budget)}, {info.n_slots} slots in each of "
        f"{info.n_layers} layers (floor {format_size(info.floor)}), policy {info.policy}, {info.io} reads with "
        f"{info.n_threads} threads{', verified' if info.verify else ''}, {kernels} expert kernels{start}{lossy}"
    )
