"""Under which conditions rows were measured, as names and values for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remoe_edge.measure.rows import Row
from remoe_edge.report.labels import format_mib


def conditions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Name and value; where rows differ, all values."""
    found = []
    for name, text in _CONDITIONS:
        values = dict.fromkeys(value for value in map(text, rows) if value)
        if values:
            found.append((name, "; ".join(values)))
    overheads = [row["timer_overhead"] for row in rows if row["timer_overhead"] is not None]
    if overheads:
        found.append(("Cost of taking times", f"at most {max(overheads) * 100:.2g} % of TPOT"))
    return found


def _field(key: str, form: Callable[[Any], str] = str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else form(row[key])


def _storage(row: Row) -> str:
    if row["storage_bytes_per_s"] is None:
        return ""
    how = "O_DIRECT" if row["storage_direct"] else "page cache"
    return (
        f"{row['storage_bytes_per_s'] / 1e6:,.0f} MB/s in reads of {row['storage_read_bytes'] / 1024:,.0f} KiB, "
        f"{row['storage_depth']} at once, {how}"
    )


def _prompts(row: Row) -> str:
    count = len(row["prompts"])
    names = ", ".join(row["prompts"]) if count <= 4 else f"{count} prompts"
    text = f"{row['workload']}: {names}" if row["prompts"] != [row["workload"]] else row["workload"]
    if row["prompt"] is not None and len(row["prompt"]) <= 40:
        text = f"\u201c{row['prompt']}\u201d"
    return text + (" (chat template)" if row["chat_template"] else "")


def _lengths(row: Row) -> str:
    return f"{row['n_prompt']} + {row['n_gen']}" if row["n_prompt"] else ""


def _limit(row: Row) -> str:
    if row["arm"] == "resident":
        return ""
    limit = row["memory_limit_bytes"]
    return "none" if limit is None else f"{format_mib(limit)} (control group v{row['cgroup']})"


def _routing(row: Row) -> str:
    """Empty for the model's own."""
    if row.get("route_bias") is None:
        return ""
    return (
        f"lossy: experts in the cache are preferred (bias {row['route_bias']:g}, the router's first "
        f"{row['route_keep']} stay)"
    )


def _cache(row: Row) -> str:
    verified = ", verified" if row.get("verify") else ""
    return f"{row['policy']}, {row['read_mode']}{verified}" if row["policy"] else ""


def _model(row: Row) -> str:
    text = Path(row["model_path"]).name
    return f"{text}: {row['model_type']}, {format_mib(row['model_size'])}" if row["model_type"] else text


_CONDITIONS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("Model", _model),
    ("Device", _field("device")),
    ("Power mode", _field("power_mode")),
    ("Prompt", _prompts),
    ("Tokens in + out", _lengths),
    ("Repetitions", _field("repetitions", lambda count: str(count) if count else "")),
    ("Threads", _field("n_threads")),
    ("Memory limit", _limit),
    ("Page cache before a run", _field("page_cache")),
    ("Storage", _storage),
    ("Cache policy, reads", _cache),
    ("Routing", _routing),
    ("Power sensor", _field("power_sensor")),
    ("llama.cpp, patches", lambda row: f"{row['build_commit']}, {(row['patch_hash'] or 'unknown')[:12]}"),
    ("Measured", _field("test_time", lambda text: str(text[:10]))),
)
