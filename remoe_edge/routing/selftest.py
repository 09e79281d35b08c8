"""Whether a recorded trace looks like the routing of a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from remoe_edge.routing.trace import Trace, reuse_rate

LEAST_EXCESS = 0.1
"""Reuse has to cover this part of the way from chance to 1. Trained models cover from 0.16 (Mixtral, 2 of 8 experts) to
0.35 (OLMoE, gpt-oss-20b); ids read from the wrong place cover none of it."""

_LEAST_STEPS = 16


@dataclass(frozen=True)
class SelfTest:
    """What reuse says about a trace.

    Attributes
    ----------
    reuse_rate, reuse_rate_per_layer
        As in `reuse_rate`; None where no step can be compared.
    chance
        K/E, the reuse rate of experts drawn at random.
    verdict
        "ok", "suspect", or "too short" to say.
    reason
        A sentence.
    """

    reuse_rate: float | None
    reuse_rate_per_layer: list[float | None]
    chance: float
    verdict: str
    reason: str


def self_test(trace: Trace) -> SelfTest:
    """Compare the reuse rate of a trace with chance, K/E: neighbouring tokens of a trained model share experts."""
    reuse = reuse_rate(trace)
    chance = trace.top_k / trace.experts
    steps = trace.tokens - sum(1 for begin, end in zip(trace.offs, trace.offs[1:], strict=False) if end > begin)
    verdict, reason = _judge(reuse.total, chance, steps)
    return SelfTest(reuse.total, reuse.per_layer, chance, verdict, reason)


def _judge(reuse: float | None, chance: float, steps: int) -> tuple[str, str]:
    if chance == 1:
        return "ok", "every token uses every expert, there is nothing to choose"
    if reuse is None or steps < _LEAST_STEPS:
        return "too short", f"{steps} tokens that follow another are too few to tell; record at least {_LEAST_STEPS}"
    if reuse == 1:
        return "suspect", "every token chose the experts of the one before: the text repeats itself, or ids are stale"
    if reuse - chance < LEAST_EXCESS * (1 - chance):
        return "suspect", (
            f"neighbouring tokens share {reuse:.1%} of their experts, and experts drawn at random would share "
            f"{chance:.1%}: the ids are not those of a trained router"
        )
    return "ok", f"neighbouring tokens share {reuse:.1%} of their experts, by chance it would be {chance:.1%}"
