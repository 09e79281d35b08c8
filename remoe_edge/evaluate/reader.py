"""What an evaluation asks of models, whatever runs them: to read text, to write some, and what they chose meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from remoe_edge.progress import Report

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Experts = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Pass:
    """One router on one text.

    Attributes
    ----------
    ids
        [rows, tokens, layers, k], chosen experts, the most likely first.
    nll
        [rows, tokens] nats; None for own output.
    kl
        [rows, tokens] KL(base || this) of the next token in nats; None for the base and for own output.
    entropy
        [layers], mean over tokens of the entropy of all experts' probabilities over log(experts): 1 is uniform. None
        where only the choice is known.
    """

    ids: Experts
    nll: Floats | None = None
    kl: Floats | None = None
    entropy: Floats | None = None


@dataclass(frozen=True)
class Noise:
    """How far the base is from itself when it is computed in another way: less than this means nothing.

    `kl_mean` and `kl_p99` are nats per token, `ppl_change` is relative, `moved` the part of chosen experts that differ.
    """

    how: str
    tokens: int
    kl_mean: float
    kl_p99: float
    ppl_change: float
    moved: float


class Reader(Protocol):
    """A base and what is held against it. `names` are those of the passes, the base first."""

    names: list[str]
    kind: str
    layers: int
    experts: int
    top_k: int

    def sequences(self, path: Path, length: int, report: Report) -> Ids:
        """[rows, length + 1] token ids of a text; each row predicts its last `length` tokens from those before."""

    def text_bytes(self, rows: Ids) -> int:
        """Bytes of UTF-8 that the predicted tokens stand for."""

    def read(self, rows: Ids, report: Report) -> list[Pass]:
        """Teacher-forced passes, one for each of `names`."""

    def write(self, prompts: Ids, tokens: int, report: Report) -> list[Pass]:
        """Routing of each one's own greedy output: `tokens` tokens after each of prompts [rows, tokens]."""

    def noise(self, rows: Ids, report: Report) -> list[Noise]:
        """The base against itself."""


def moved(a: Experts, b: Experts) -> float:
    """Part of the experts of `a` that `b` did not choose for the same token."""
    return float(1 - (a[..., :, None] == b[..., None, :]).any(-1).mean())


def noise(how: str, base: Pass, again: Pass) -> Noise:
    """Figures from two passes of the base; the second carries the KL."""
    assert base.nll is not None
    assert again.nll is not None
    assert again.kl is not None
    return Noise(
        how,
        again.kl.size,
        float(again.kl.mean()),
        float(np.quantile(again.kl, 0.99)),
        float(np.expm1(again.nll.mean(dtype=float) - base.nll.mean(dtype=float))),
        moved(base.ids, again.ids),
    )
