"""The columns of a report's table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remoe_edge.measure.rows import Row
from remoe_edge.report.labels import DASH, format_ms


@dataclass(frozen=True)
class Column:
    """`value` is for sorting, None where there is none; `text` is for reading."""

    name: str
    title: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]


def columns(rows: Sequence[Row]) -> list[Column]:
    """All columns in which any row has a value."""
    return [column for column in _COLUMNS if any(column.value(row) is not None for row in rows)]


def _column(name: str, title: str, key: str, form: Callable[[float], str]) -> Column:
    def value(row: Row) -> float | None:
        found = row.get(key)
        return None if found is None else float(found)

    def text(row: Row) -> str:
        found = value(row)
        return DASH if found is None else form(found)

    return Column(name, title, value, text)


def _interval(row: Row) -> str:
    edges = row["tpot_ms_ci95"]
    return f"{format_ms(edges[0])}{DASH}{format_ms(edges[1])}" if edges else DASH


_COLUMNS = (
    _column(
        "TPOT ms",
        "Time per output token: (last - first token) / (n - 1), median over repetitions",
        "tpot_ms",
        format_ms,
    ),
    Column(
        "95 %",
        "95 % bootstrap interval of TPOT over repetitions",
        lambda row: row["tpot_ms_ci95"][0] if row["tpot_ms_ci95"] else None,
        _interval,
    ),
    _column(
        "\u00d7 limit", "TPOT over max(resident TPOT, bytes / bandwidth)", "limit_ratio", lambda value: f"{value:.2f}"
    ),
    _column("tokens/s", "1 / TPOT", "tokens_per_s", lambda value: f"{value:.3g}"),
    _column("p50", "Half of the times between tokens are shorter, ms", "itl_ms_p50", format_ms),
    _column("p95", "95 % of the times between tokens are shorter, ms", "itl_ms_p95", format_ms),
    _column("p99", "99 % of the times between tokens are shorter, ms", "itl_ms_p99", format_ms),
    _column("max", "Longest time between tokens, ms", "itl_ms_max", format_ms),
    _column("TTFT ms", "Time to first token", "ttft_ms", format_ms),
    _column("hits", "Experts found in the cache", "hit_rate", lambda value: f"{value:.1%}"),
    _column("MB/token", "Read from storage for each token", "bytes_per_token", lambda value: f"{value / 1e6:.1f}"),
    _column("stall ms", "Per token, time in which compute waited for reads", "stall_ms_per_token", format_ms),
    _column(
        "peak MiB",
        "Anonymous and shared memory; not the page cache",
        "peak_memory_bytes",
        lambda value: f"{value / 2**20:,.0f}",
    ),
    _column(
        "J/token",
        "Energy per token while decoding, idle power included",
        "joules_per_token",
        lambda value: f"{value:.3g}",
    ),
)
