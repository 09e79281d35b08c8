"""What an n-gram model makes of the demo model's text: bits per byte by domain.

    scripts/ngram_baseline.py --work FOLDER        (the --work folder of train_demo_model.py)

Interpolated modified Kneser-Ney of order 5 (Chen and Goodman 1999) on the same training tokens and tokenizer.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ORDER = 5

Ints = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


class _Level:
    """Counts of one order: how often a word follows a context, and what is left for shorter contexts."""

    def __init__(self, grams: Ints, counts: npt.NDArray[Any], bits: int) -> None:
        self._grams, self._counts, self._bits = grams, counts, np.uint64(bits)
        n1, n2, n3, n4 = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        # Discounts of words seen once, twice, and more often.
        self._discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]).clip(0)
        self._contexts, first = np.unique(grams >> self._bits, return_index=True)
        self._totals = np.add.reduceat(counts, first).astype(np.float64)
        self._left = np.add.reduceat(self._discounts[counts.clip(max=3)], first)

    def __call__(self, grams: Ints, shorter: Floats) -> Floats:
        """Probability of the last word of each gram, given that of the shorter context."""
        at = np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)
        count = np.where(self._grams[at] == grams, self._counts[at], 0)
        context = grams >> self._bits
        at = np.searchsorted(self._contexts, context).clip(max=len(self._contexts) - 1)
        known = self._contexts[at] == context
        mass = count - self._discounts[count.clip(max=3)]
        return np.where(known, (mass + self._left[at] * shorter) / self._totals[at], shorter)


class KneserNey:
    """Interpolated modified Kneser-Ney of token ids below `vocabulary`."""

    def __init__(self, tokens: npt.NDArray[Any], vocabulary: int, order: int = ORDER) -> None:
        self._bits = max(1, (vocabulary - 1).bit_length())
        if self._bits * order > 64:
            raise ValueError(f"{order} tokens of {self._bits} bits do not fit 64 bits")
        self._vocabulary, self._order = vocabulary, order
        grams, counts = np.unique(self._windows(tokens, order), return_counts=True)
        self._levels = [_Level(grams, counts, self._bits)]
        for n in range(order - 1, 0, -1):
            # Lower orders count the different words before a gram, not its uses.
            suffix = grams & np.uint64((1 << self._bits * n) - 1)
            grams, counts = np.unique(suffix, return_counts=True)
            self._levels.insert(0, _Level(grams, counts, self._bits))

    def probabilities(self, tokens: npt.NDArray[Any]) -> Floats:
        """Of each token [tokens - order + 1] that has `order` - 1 tokens before it."""
        windows = self._windows(tokens, self._order)
        p: Floats = np.full(len(windows), 1 / self._vocabulary)
        for n, level in enumerate(self._levels, 1):
            p = level(windows & np.uint64((1 << self._bits * n) - 1), p)
        return p

    def _windows(self, tokens: npt.NDArray[Any], n: int) -> Ints:
        wide = tokens.astype(np.uint64)
        windows = np.zeros(len(wide) - n + 1, np.uint64)
        for i in range(n):
            windows = windows << np.uint64(self._bits) | wide[i : len(wide) - n + 1 + i]
        return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work / "tokens"
    names = sorted(path.name.split(".")[0] for path in folder.glob("*.train.npy"))
    train = np.concatenate([np.load(folder / f"{name}.train.npy") for name in names])
    model = KneserNey(train, int(train.max()) + 1)
    for name in names:
        held_out = np.load(folder / f"{name}.held_out.npy")
        p = model.probabilities(held_out)
        size = len((folder / f"{name}.held_out.txt").read_bytes()) * len(p) / len(held_out)
        print(
            json.dumps({"domain": name, "bits_per_byte": -np.log2(p).sum() / size, "ppl": math.exp(-np.log(p).mean())})
        )


if __name__ == "__main__":
    main()
