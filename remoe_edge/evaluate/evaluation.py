"""The whole evaluation of tuned routers against their base: every text, length and router, as one JSON-able object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.compare import compare, over_seeds
from remoe_edge.evaluate.passes import RouterState, read_text, write_text
from remoe_edge.evaluate.verdict import judge
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE
from remoe_edge.tuning.data import load_sequences

PROMPT_TOKENS = 32


def evaluate(
    moe: MoE,
    tokenizer: Any,
    tuned: Mapping[str, RouterState],
    texts: Mapping[str, Path],
    *,
    base: RouterState,
    controls: Mapping[str, RouterState] | None = None,
    others: Mapping[str, RouterState] | None = None,
    length: int = 512,
    sequences: int = 32,
    longer: Sequence[int] = (2, 4),
    own_tokens: int = 128,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure routers on held-out text.

    Parameters
    ----------
    tuned, controls
        Routers of one setting with several seeds, and of CE-only runs, by name.
    others
        Further routers, such as those of ablations: measured, but not judged.
    texts
        Held-out files by domain; figures of all of them together are those of "all".
    length, sequences
        Tokens per sequence, as in training, and the most sequences of each text.
    longer
        Multiples of `length` at which perplexity and reuse beyond it are measured.
    own_tokens
        Length of the model's own greedy output whose routing is measured, too; 0 skips that.

    Raises RemoeError for a text that is too short.
    """
    routers = {"base": base, **tuned, **(controls or {}), **(others or {})}
    names = list(routers)
    multiples = (1, *longer)
    work = len(texts) * len(multiples)
    result: dict[str, Any] = {
        "remoe_edge": __version__,
        "model_type": moe.model_type,
        "layers": moe.layers,
        "experts": moe.experts,
        "top_k": moe.top_k,
        "length": length,
        "chance_reuse_rate": moe.top_k / moe.experts,
        "texts": {name: str(path) for name, path in texts.items()},
        "rows": [],
    }
    for index, (domain, path) in enumerate(texts.items()):
        for turn, multiple in enumerate(multiples):
            try:
                rows = load_sequences([path], tokenizer, length * multiple).ids[: max(2, sequences // multiple)]
            except RemoeError:
                if multiple == 1:
                    raise
                continue
            done = index * len(multiples) + turn

            def progress(text: str, part: float | None, done: int = done, domain: str = domain) -> None:
                report(f"{text}: {domain}", (done + (part or 0)) / work)

            passes = read_text(moe, rows, list(routers.values()), report=progress)
            noise = passes[0]
            for name, one in zip(names[1:], passes[1:], strict=True):
                row = compare(noise, one, moe.experts, inside=length if multiple > 1 else None)
                result["rows"].append({"router": name, "text": domain, "multiple": multiple, "phase": "reading", **row})
            if multiple == 1 and own_tokens:
                written = _own(moe, rows, routers, own_tokens)
                for name in names[1:]:
                    row = compare(written["base"], written[name], moe.experts)
                    result["rows"].append({"router": name, "text": domain, "multiple": 1, "phase": "writing", **row})
    for name in names[1:]:
        result["rows"].append(_together([row for row in result["rows"] if row["router"] == name], name))
    totals = {row["router"]: row for row in result["rows"] if row["text"] == "all"}
    chosen = [totals[name] for name in tuned]
    result["verdicts"] = [asdict(v) | {"text": str(v)} for v in judge(chosen, [totals[n] for n in controls or {}])]
    first = chosen[0]
    keys = ("reuse_rate_base", "ppl_base")
    result |= {key: first[key] for key in keys}
    for key in ("reuse_rate_tuned", "ppl_tuned", "reuse_rate_change", "ppl_change", "kl_mean"):
        result[key] = over_seeds(chosen, key)["mean"]
    result["ppl_delta_ci95"] = over_seeds(chosen, "ppl_change")["ci95"] or first["ppl_delta_ci95"]
    result["lru_miss_change"] = {
        name: float(np.mean([row["lru_miss_change"][name] for row in chosen])) for name in first["lru_miss_change"]
    }
    return result


def _own(moe: MoE, rows: npt.NDArray[np.int64], routers: Mapping[str, RouterState], tokens: int) -> dict[str, Any]:
    prompts = rows[:8, :PROMPT_TOKENS]
    return {name: write_text(moe, prompts, tokens, router) for name, router in routers.items()}


def _together(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """One router over all texts read at the length of training, each text with the weight of its tokens."""
    read = [row for row in rows if row["phase"] == "reading" and row["multiple"] == 1]
    weights = np.array([row["tokens"] for row in read], float)
    weights /= weights.sum()

    def mean(key: str) -> float:
        return float(sum(w * row[key] for w, row in zip(weights, read, strict=True)))

    total: dict[str, Any] = {"router": name, "text": "all", "multiple": 1, "phase": "reading"}
    total["tokens"] = sum(row["tokens"] for row in read)
    for key in ("reuse_rate_base", "reuse_rate_tuned", "kl_mean", "load_cv_base", "load_cv_tuned"):
        total[key] = mean(key)
    for key in ("load_entropy", "routing_entropy", "distinct_experts"):
        for side in "base", "tuned":
            total[f"{key}_{side}"] = mean(f"{key}_{side}")
    total["reuse_rate_change"] = total["reuse_rate_tuned"] / total["reuse_rate_base"] - 1
    for side in "base", "tuned":
        logs = [np.log(row[f"ppl_{side}"]) for row in read]
        total[f"ppl_{side}"] = float(np.exp((weights * logs).sum()))
        total[f"lru_hit_rate_{side}"] = {
            key: float(sum(w * row[f"lru_hit_rate_{side}"][key] for w, row in zip(weights, read, strict=True)))
            for key in read[0][f"lru_hit_rate_{side}"]
        }
    total["ppl_change"] = total["ppl_tuned"] / total["ppl_base"] - 1
    # Of independent texts: variances add, with the weights squared.
    half = np.sqrt(
        sum(
            (w * (r["ppl_delta_ci95"][1] - r["ppl_delta_ci95"][0]) / 2) ** 2 for w, r in zip(weights, read, strict=True)
        )
    )
    total["ppl_delta_ci95"] = [float(total["ppl_change"] - half), float(total["ppl_change"] + half)]
    total["lru_miss_change"] = {
        key: (1 - total["lru_hit_rate_tuned"][key]) / (1 - total["lru_hit_rate_base"][key]) - 1
        for key in total["lru_hit_rate_base"]
    }
    return total
