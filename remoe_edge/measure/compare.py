"""What changed from one benchmark to another, arm by arm, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.measure.rows import Row, arm_key, run_tpots
from remoe_edge.measure.stats import Change, Samples, compare

_MUST_AGREE = {
    "power mode": ("power_mode", "jetson_clocks"),
    "prompts": ("prompts_sha256", "chat_template"),
    "length of the output": ("n_gen",),
}
_TOLD = {
    "device": "device",
    "model": "model_fingerprint",
    "llama.cpp": "llama_cpp_commit",
    "patches": "patch_hash",
    "threads": "n_threads",
    "GPU": "gpu_info",
    "layers on the GPU": "n_gpu_layers",
    "kernels": "kernels",
    "policy": "policy",
    "read mode": "read_mode",
    "first choices that a route bias keeps": "route_keep",
    "reader threads": "cache_threads",
    "reads verified": "verify",
    "slots per layer": "n_slots",
    "memory limit": "memory_limit_bytes",
    "page cache": "page_cache",
    "power sensor": "power_sensor",
    "power mode": "power_mode",
    "jetson_clocks": "jetson_clocks",
    "prompts": "prompts_sha256",
    "chat template": "chat_template",
    "tokens": "n_gen",
}
_STORAGE_TOLD = 1.1
"""Storage whose speed changed by this factor may explain other changes."""
_HASH_SHOWN = 12


@dataclass(frozen=True)
class Comparison:
    """One arm in two benchmarks.

    Attributes
    ----------
    tpot, energy
        Change of TPOT and of joules per token; None where one side was not measured.
    verdict
        Of TPOT, as in `Change.verdict`; "not measured" without it.
    conditions
        What differs, as sentences such as "policy: lfu, now lru".
    same_output
        Whether both put out the same tokens; None if one side is not known.
    """

    old: Row
    new: Row
    tpot: Change | None
    energy: Change | None
    verdict: str
    conditions: list[str]
    same_output: bool | None


@dataclass(frozen=True)
class Comparisons:
    """Arms of both benchmarks, and rows that the other one lacks."""

    pairs: list[Comparison]
    only_old: list[Row]
    only_new: list[Row]


def compare_benchmarks(
    old: Sequence[Row], new: Sequence[Row], *, margin: float = 0.03, anyway: bool = False
) -> Comparisons:
    """Compare the rows of two benchmarks.

    `margin` is the relative difference that does not matter: "equivalent" means that the interval lies within it.

    Raises RemoeError if no arm is in both, and, without `anyway`, if power mode, prompts or output length differ.
    """
    matched, only_old, only_new = _match(old, new)
    if not matched:
        raise RemoeError("no arm is in both files: nothing to compare")
    if not anyway:
        _refuse(matched)
    pairs = []
    for before, after in matched:
        tpot = _change(before, after, run_tpots)
        pairs.append(
            Comparison(
                old=before,
                new=after,
                tpot=tpot,
                energy=_change(before, after, _joules),
                verdict=tpot.verdict(margin) if tpot else "not measured",
                conditions=_conditions(before, after),
                same_output=_same_output(before, after),
            )
        )
    return Comparisons(pairs, only_old, only_new)


def _match(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """Rows of the same arm: first by all that defines it, then by the budget alone, where that is unique.

    Files of one model each are compared even if the models have other names, as before and after tuning.
    """
    one_model = all(len({row["model_path"] for row in rows}) == 1 for rows in (old, new))

    def name(row: Row) -> str:
        return "" if one_model else Path(row["model_path"]).name

    keys: list[Callable[[Row], Hashable]] = [
        lambda row: (name(row), *arm_key(row)),
        lambda row: (name(row), row["arm"], row["budget"], row["repack"], row.get("route_bias")),
    ]
    matched: dict[int, int] = {}
    for key in keys:
        for index, row in enumerate(old):
            same_old = [i for i, other in enumerate(old) if i not in matched and key(other) == key(row)]
            same_new = [i for i, other in enumerate(new) if i not in matched.values() and key(other) == key(row)]
            if index not in matched and len(same_old) == len(same_new) == 1:
                matched[index] = same_new[0]
    return (
        [(old[index], new[matched[index]]) for index in sorted(matched)],
        [row for index, row in enumerate(old) if index not in matched],
        [row for index, row in enumerate(new) if index not in matched.values()],
    )


def _refuse(matched: Sequence[tuple[Row, Row]]) -> None:
    for name, fields in _MUST_AGREE.items():
        for before, after in matched:
            # A failed run knows less about its conditions; it is not compared anyhow.
            if before["tpot_ms"] is None or after["tpot_ms"] is None:
                continue
            differing = [field for field in fields if before.get(field) != after.get(field)]
            if differing:
                values = ", ".join(f"{field} {before.get(field)} and {after.get(field)}" for field in differing)
                raise RemoeError(
                    f"the {name} differs ({values}): times cannot be compared; measure both alike, or pass --anyway"
                )


def _change(before: Row, after: Row, values: Callable[[Row], dict[tuple[str, int], float]]) -> Change | None:
    sides = [_by_prompt(values(row)) if row["status"] == "ok" else {} for row in (before, after)]
    if not all(sides):
        return None
    if set(sides[0]) != set(sides[1]):
        # Told to compare other prompts: all runs are of one kind then.
        sides = [{"": [value for values in side.values() for value in values]} for side in sides]
    return compare(sides[0], sides[1])


def _by_prompt(values: dict[tuple[str, int], float]) -> Samples:
    prompts: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        prompts.setdefault(prompt, []).append(value)
    return prompts


def _joules(row: Row) -> dict[tuple[str, int], float]:
    return {
        (sample["prompt"], sample["repetition"]): sample["energy"]["joules_per_token"]
        for sample in row["samples"]
        if sample["energy"] and sample["energy"]["joules_per_token"]
    }


def _conditions(before: Row, after: Row) -> list[str]:
    found = [
        f"{name}: {_short(before.get(field))}, now {_short(after.get(field))}"
        for name, field in _TOLD.items()
        if before.get(field) != after.get(field)
    ]
    speeds = before["storage_bytes_per_s"], after["storage_bytes_per_s"]
    if before["arm"] != "resident" and None not in speeds and max(speeds) / min(speeds) > _STORAGE_TOLD:
        found.append(f"storage: {speeds[0] / 1e6:.0f} MB/s, now {speeds[1] / 1e6:.0f} MB/s")
    return found


def _short(value: Any) -> str:
    return "not known" if value is None else str(value)[:_HASH_SHOWN] if len(str(value)) == 64 else str(value)


def _same_output(before: Row, after: Row) -> bool | None:
    hashes = before["output_sha256"], after["output_sha256"]
    return None if None in hashes else hashes[0] == hashes[1]
