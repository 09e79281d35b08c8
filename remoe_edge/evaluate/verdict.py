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
    """`reached` is None where the evaluation has no control to judge by; `aside` is what is good to know beside it."""

    goal: str
    figure: str
    reached: bool | None
    aside: str = ""

    def __str__(self) -> str:
        word = {True: "reached", False: "NOT reached", None: "not measured"}[self.reached]
        return f"{self.goal}: {self.figure}: {word}" + (f" ({self.aside})" if self.aside else "")


def judge(
    tuned: Sequence[dict[str, Any]],
    controls: Sequence[dict[str, Any]] = (),
    own_output: Sequence[dict[str, Any]] = (),
) -> list[Verdict]:
    """Of rows of `compare` for all texts together, one per seed: of tuned routers, of CE-only controls, and of what the
    tuned routers wrote themselves.

    Goals are judged on held-out text, where the published figures come from.
    """
    verdicts = [
        Verdict(
            "reuse rate up by at least 26 %",
            (said := _Figure(tuned, "reuse_rate_change")).text,
            said.mean >= REUSE_GOAL,
            _own(own_output, "reuse_rate_change"),
        ),
        Verdict(
            "perplexity within 1 %",
            (said := _Figure(tuned, "ppl_change", "ppl_delta_ci95")).text,
            abs(said.mean) <= PPL_GOAL,
            said.aside(-PPL_GOAL, PPL_GOAL),
        ),
        Verdict(
            "LRU misses at C = K down by at least 7 %",
            (said := _Figure(_at_k(tuned), "miss")).text,
            said.mean <= MISS_GOAL,
            _own(_at_k(own_output), "miss"),
        ),
    ]
    goal = "CE-only control at or below base"
    if controls:
        control = _Figure(controls, "reuse_rate_change")
        return [*verdicts, Verdict(goal, control.text, control.mean <= 0, _control_aside(controls, control))]
    return [*verdicts, Verdict(goal, "no control in this evaluation", None)]


class _Figure:
    """A mean over seeds with its interval; for a single one that over sequences."""

    def __init__(self, rows: Sequence[dict[str, Any]], key: str, interval: str = "") -> None:
        found = over_seeds(rows, key)
        self.mean: float = found["mean"]
        self._ci95: list[float] | None = found["ci95"]
        unit = f" over {len(rows)} seeds"
        if self._ci95 is None:
            self._ci95, unit = rows[0].get(interval or f"{key}_ci95"), " over sequences"
        self.text = f"{self.mean:+.2%}"
        if self._ci95:
            self.text += f" [{self._ci95[0]:+.2%}, {self._ci95[1]:+.2%}]{unit}"

    def excludes(self, value: float) -> bool:
        return self._ci95 is not None and not self._ci95[0] <= value <= self._ci95[1]

    def aside(self, low: float, high: float) -> str:
        """What to know of a mean within these limits."""
        beyond = self._ci95 is not None and not low <= self._ci95[0] <= self._ci95[1] <= high
        return "its interval reaches beyond" if beyond and low <= self.mean <= high else ""


def _at_k(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"miss": row["lru_miss_change"]["C=K"], "miss_ci95": row.get("lru_miss_change_ci95", {}).get("C=K")}
        for row in rows
    ]


def _control_aside(controls: Sequence[dict[str, Any]], found: _Figure) -> str:
    """Whether a gain is more than chance, and whether it is more than a less even load brings by itself."""
    if found.mean <= 0:
        return ""
    beyond = over_seeds(controls, "reuse_beyond_load_change")["mean"]
    chance = "more than chance" if found.excludes(0) else "its interval holds 0"
    return f"{chance}; beyond its load {100 * beyond:+.2f} points"


def _own(rows: Sequence[dict[str, Any]], key: str) -> str:
    return f"on own output {_Figure(rows, key).text}" if rows else ""
