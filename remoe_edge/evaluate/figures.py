"""What one router did on some text, sequence by sequence, so that a bootstrap can draw sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.evaluate.reader import Experts, Pass
from remoe_edge.routing.simulate import CACHES, simulate_all
from remoe_edge.routing.trace import Trace

Floats = npt.NDArray[np.float64]

_EIGHTHS = {"1/8": 1, "1/4": 2, "3/8": 3, "1/2": 4}


@dataclass(frozen=True, eq=False)
class Figures:
    """All sequences have the same length.

    Attributes
    ----------
    reuse
        [rows, layers], EOR: |E(t) and E(t-1)| / K, mean over the steps of a sequence.
    reuse_steps
        [rows, tokens - 1], the same as a mean over layers.
    misses
        By cache ("cold": empty at every sequence; "carried") and by size as in `slots_for`: [rows].
    uses
        Experts looked up in a sequence.
    counts
        [layers, experts], how often each was used.
    entropy
        [layers] or None, as in `Pass`.
    nll, kl
        [rows, tokens] or None, as in `Pass`.
    """

    reuse: Floats
    reuse_steps: Floats
    misses: dict[str, dict[str, npt.NDArray[np.int64]]]
    uses: int
    counts: npt.NDArray[np.int64]
    entropy: Floats | None
    nll: Floats | None
    kl: Floats | None

    def __len__(self) -> int:
        return len(self.reuse)

    @property
    def load_cv(self) -> Floats:
        """[layers], standard deviation over mean of how often experts are used: 0 is even."""
        cv: Floats = self.counts.std(1) / self.counts.mean(1)
        return cv

    @property
    def load_entropy(self) -> Floats:
        """[layers], entropy of how often experts are used over log(experts): 1 is even."""
        part = self.counts / self.counts.sum(1, keepdims=True)
        entropy: Floats = -(part * np.log(np.where(part > 0, part, 1))).sum(1) / np.log(self.counts.shape[1])
        return entropy

    @property
    def load_reuse(self) -> Floats:
        """[layers], the reuse rate of tokens that know nothing of each other but use experts as often as these do."""
        part = self.counts / self.counts.sum(1, keepdims=True)
        top_k = self.uses / self.reuse.shape[1] / (self.reuse_steps.shape[1] + 1)
        rate: Floats = top_k * (part**2).sum(1)
        return rate

    @property
    def distinct(self) -> npt.NDArray[np.int64]:
        """[layers], experts used at all."""
        used: npt.NDArray[np.int64] = (self.counts > 0).sum(1)
        return used


def slots_for(experts: int, top_k: int) -> dict[str, int]:
    """Slots per layer by C/E, "1/8" to "1/2", never fewer than a token needs; C = K beside them."""
    return {"C=K": top_k} | {name: max(top_k, experts * part // 8) for name, part in _EIGHTHS.items()}


def figures(one: Pass, experts: int) -> Figures:
    """Of a pass over text or own output."""
    rows, tokens, layers, k = one.ids.shape
    shared = np.zeros((rows, tokens - 1, layers))
    for rank in range(k):
        shared += (one.ids[:, 1:] == one.ids[:, :-1, :, rank, None]).any(-1)
    shared /= k
    counts = [np.bincount(one.ids[:, :, layer].ravel(), minlength=experts) for layer in range(layers)]
    return Figures(
        reuse=shared.mean(1),
        reuse_steps=shared.mean(2),
        misses=_misses(one.ids, experts),
        uses=tokens * layers * k,
        counts=np.stack(counts),
        entropy=_wide(one.entropy),
        nll=_wide(one.nll),
        kl=_wide(one.kl),
    )


def join(parts: Sequence[Figures]) -> Figures:
    """Of several texts with sequences of the same length."""

    def rows(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    entropies = [part.entropy for part in parts if part.entropy is not None]
    return Figures(
        reuse=rows("reuse"),
        reuse_steps=rows("reuse_steps"),
        misses={
            cache: {name: np.concatenate([part.misses[cache][name] for part in parts]) for name in sizes}
            for cache, sizes in parts[0].misses.items()
        },
        uses=parts[0].uses,
        counts=np.sum([part.counts for part in parts], axis=0),
        entropy=np.average(entropies, axis=0, weights=[len(p) for p in parts])
        if len(entropies) == len(parts)
        else None,
        nll=rows("nll"),
        kl=rows("kl"),
    )


def _misses(ids: Experts, experts: int) -> dict[str, dict[str, npt.NDArray[np.int64]]]:
    rows, tokens, layers, k = ids.shape
    trace = Trace(ids.reshape(-1, layers, k), np.arange(rows + 1) * tokens, {"experts": experts})
    sizes = slots_for(experts, k)
    found = {}
    for cache in CACHES:
        simulations = simulate_all(trace, [(slots, "lru") for slots in sizes.values()], cache=cache)
        found[cache] = {name: one.counters[..., 1].sum(0) for name, one in zip(sizes, simulations, strict=True)}
    return found


def _wide(values: npt.NDArray[np.float32] | None) -> Floats | None:
    return None if values is None else values.astype(np.float64)
