"""How good forecasts of the next layer's experts are: precision, recall and wasted bytes, on text that the model reads.

    python scripts/forecast_recall.py demo demo-tuned --slots 8 --slots 12 --slots 16 -o forecast.jsonl

Text is teacher-forced, token by token, cut into pieces that each start from an empty context; the expert cache stays as
it is between them. Intervals are bootstraps over pieces. Counts, not times: other load on the machine changes how much
is read ahead, and little else.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from remoe_edge.demo_model import demo_texts
from remoe_edge.parameters import model_path
from remoe_edge.runtime.llama import CacheConfig, load_model

COUNTS = ("forecast_experts", "forecast_used", "forecast_needed", "forecasts", "forecasts_read")
BYTES = ("bytes_demand", "bytes_prefetch", "bytes_prefetch_used")


def measure(model: Path, slots: int, prefetch: str, texts: dict[str, Path], pieces: int, length: int) -> dict:
    """Counts [pieces, layers] of every text."""
    results = {}
    with (
        load_model(model, CacheConfig(f"{slots}s", prefetch=prefetch)) as loaded,
        loaded.session(n_ctx=length, n_threads=1) as session,
    ):
        info = session.info()
        for name, path in texts.items():
            tokens = session.tokenize(path.read_text(encoding="utf-8"))
            # Evenly spread over the text, not its beginning.
            starts = np.linspace(0, len(tokens) - length, pieces).astype(int)
            counts = []
            for start in starts:
                session.reset_stats()
                session.score(tokens[start : start + length])
                layers = [session.stats(layer) for layer in range(info.n_layers)]
                counts.append([[getattr(layer, key) for layer in layers] for key in COUNTS + BYTES])
            results[name] = np.array(counts)
    return results


def ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    """Sum over sum, and its 95 % interval over the first axis."""
    draws = np.random.default_rng(0).integers(0, len(part), (2000, len(part)))
    low, high = np.percentile(part[draws].sum(1) / np.maximum(whole[draws].sum(1), 1), (2.5, 97.5))
    return float(part.sum() / max(whole.sum(), 1)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=model_path)
    parser.add_argument("--slots", type=int, action="append", required=True)
    parser.add_argument("--prefetch", action="append")
    parser.add_argument("--text", type=Path, action="append", help="text files (default: the demo's held-out texts)")
    parser.add_argument("--pieces", type=int, default=8, help="of every text")
    parser.add_argument("--length", type=int, default=192, help="tokens of a piece")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    texts = {path.stem: path for path in args.text} if args.text else demo_texts()
    for model in args.models:
        for slots in args.slots:
            for prefetch in args.prefetch or ["router", "auto"]:
                by_text = measure(model, slots, prefetch, texts, args.pieces, args.length)
                every = np.concatenate(list(by_text.values())).transpose(1, 0, 2)  # [keys, pieces, layers]
                count = dict(zip(COUNTS + BYTES, every, strict=True))
                total = {key: value.sum(1) for key, value in count.items()}
                wasted = total["bytes_prefetch"] - total["bytes_prefetch_used"]
                tokens = every.shape[1] * (args.length - 1)
                row = {
                    "model": model.name,
                    "slots": slots,
                    "prefetch": prefetch,
                    "texts": list(texts),
                    "tokens": tokens,
                    "precision": ratio(total["forecast_used"], total["forecast_experts"]),
                    "recall": ratio(total["forecast_used"], total["forecast_needed"]),
                    "read_share": float(total["forecasts_read"].sum() / max(total["forecasts"].sum(), 1)),
                    "demand_bytes_per_token": float(total["bytes_demand"].sum() / tokens),
                    "prefetch_bytes_per_token": float(total["bytes_prefetch"].sum() / tokens),
                    "wasted_of_prefetch": ratio(wasted, total["bytes_prefetch"]),
                    "precision_by_layer": [
                        ratio(u, n) if n.sum() else None
                        for u, n in zip(count["forecast_used"].T, count["forecast_experts"].T, strict=True)
                    ],
                    "recall_by_layer": [
                        ratio(u, n) if n.sum() else None
                        for u, n in zip(count["forecast_used"].T, count["forecast_needed"].T, strict=True)
                    ],
                    "precision_by_text": {
                        name: ratio(value[:, 1].sum(1), value[:, 0].sum(1)) for name, value in by_text.items()
                    },
                }
                if args.output:
                    with args.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                print(f"{row['model']} {slots} slots {prefetch}:", end="")
                for key in ("precision", "recall", "wasted_of_prefetch"):
                    value, low, high = row[key]
                    print(f" {key} {value:.1%} [{low:.1%}, {high:.1%}]", end="")
                print(f" read {row['read_share']:.0%}, {row['prefetch_bytes_per_token'] / 1e3:.0f} kB ahead of", end="")
                print(f" {row['demand_bytes_per_token'] / 1e3:.0f} kB demanded per token")
                print("  by layer:", " ".join("-" if p is None else f"{p[0]:.2f}" for p in row["precision_by_layer"]))


if __name__ == "__main__":
    main()
