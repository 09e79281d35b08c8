"""What there is to show of a running server or benchmark at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArmState:
    """One way of a benchmark to hold the experts: what its runs so far gave."""

    label: str
    status: str
    runs: int
    tpot_ms: float | None
    hit_rate: float | None
    bytes_per_token: float | None


@dataclass(frozen=True)
class Frame:
    """One moment. None is "not known" everywhere.

    Attributes
    ----------
    source, state
        What is watched, and in a few words what it does.
    ttft_ms, tpot_ms, tokens_per_s, hit_rate, layer_hit_rate
        Of the last seconds; of a server that did nothing then, since its start.
    read_bytes_per_s, prefetch_bytes_per_s
        What the cache reads from storage, and the part of it that is read ahead.
    stall_share
        Part of the time that compute waits for reads.
    storage_bytes_per_s
        What the storage can do, measured.
    memory_bytes
        Anonymous and shared memory at its peak.
    arms
        Of a benchmark.
    """

    source: str
    state: str
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    layer_hit_rate: tuple[float | None, ...] = ()
    read_bytes_per_s: float | None = None
    prefetch_bytes_per_s: float | None = None
    stall_share: float | None = None
    evictions_per_s: float | None = None
    storage_bytes_per_s: float | None = None
    budget_bytes: int | None = None
    used_bytes: int | None = None
    memory_bytes: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    arms: tuple[ArmState, ...] = ()
