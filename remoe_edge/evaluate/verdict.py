"""The goals that a tuned router is held against, and what came of them, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remoe_edge.evaluate.compare import over_seeds

REUSE_GOAL = 0.26
PPL_GOAL = 0.01
MISS_GOAL = -0.07


@dataclass(frozen=True)
class Verdict:
    """`reached` is None where the evaluation has no control to judge by."""

    goal: str
    figure: str
    reached: bool | None

    def __str__(self) -> str:
        word = {True: "reached", False: "NOT reached", None: "not measured"}[self.reached]
        return f"{self.goal}: {self.figure}: {word}"


def judge(tuned: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]] = ()) -> list[Verdict]:
    """Of rows of `compare`, one per seed, and of those of CE-only controls."""
    flat = [{**row, "miss": row["lru_miss_change"]["C=K"]} for row in tuned]
    reuse, ppl, miss = (over_seeds(flat, key) for key in ("reuse_rate_change", "ppl_change", "miss"))
    verdicts = [
        Verdict("reuse rate up by at least 26 %", _say(reuse), reuse["mean"] >= REUSE_GOAL),
        Verdict("perplexity within 1 %", _say(ppl), abs(ppl["mean"]) <= PPL_GOAL),
        Verdict("LRU misses at C = K down by at least 7 %", _say(miss), miss["mean"] <= MISS_GOAL),
    ]
    if controls:
        control = over_seeds(controls, "reuse_rate_change")
        verdicts.append(Verdict("CE-only control at or below base", _say(control), control["mean"] <= 0))
    else:
        verdicts.append(Verdict("CE-only control at or below base", "no control in this evaluation", None))
    return verdicts


def _say(figure: dict[str, Any]) -> str:
    text = f"{figure['mean']:+.2%}"
    if figure["ci95"]:
        text += f" [{figure['ci95'][0]:+.2%}, {figure['ci95'][1]:+.2%}] over {len(figure['seeds'])} seeds"
    return text
