"""The whole evaluation of tuned routers against their base: every text, length and router, as one JSON-able object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.compare import compare, over_seeds
from remoe_edge.evaluate.figures import Figures, figures, join, slots_for
from remoe_edge.evaluate.reader import Ids, Reader
from remoe_edge.evaluate.verdict import judge
from remoe_edge.progress import Report, silent

PROMPT_TOKENS = 32
PROMPTS = 8
TUNED, CONTROL = "tuned", "ce-only"
"""Names of the group that verdicts are about, and of that of the controls."""

_NOISE = 0.04
_WRITING = 0.25
"""Parts of the work on a text, for progress."""


def evaluate(
    reader: Reader,
    texts: Mapping[str, Path],
    *,
    groups: Mapping[str, Sequence[str]],
    length: int = 512,
    sequences: int = 32,
    longer: Sequence[int] = (2, 4),
    own_tokens: int = 128,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure routers on held-out text.

    Parameters
    ----------
    texts
        Held-out files by domain; figures of all of them together are those of "all".
    groups
        Names of the reader's routers by setting; those of one are its seeds. TUNED is judged, CONTROL is the CE-only
        control, others are measured beside them.
    length, sequences
        Tokens per sequence, as in training, and the most sequences of each text.
    longer
        Multiples of `length` at which the same text is read in longer sequences.
    own_tokens
        Length of the model's own greedy output whose routing is measured, too; 0 skips that.

    Raises RemoeError for a text that is too short.
    """
    base, others = reader.names[0], reader.names[1:]
    result: dict[str, Any] = {
        "remoe_edge": __version__,
        "model_type": reader.kind,
        "layers": reader.layers,
        "experts": reader.experts,
        "top_k": reader.top_k,
        "length": length,
        "slots": slots_for(reader.experts, reader.top_k),
        "chance_reuse_rate": reader.top_k / reader.experts,
        "texts": {name: str(path) for name, path in texts.items()},
        "noise": [],
        "rows": [],
    }
    read: dict[str, dict[str, Figures]] = {}
    written: dict[str, dict[str, Figures]] = {}
    nbytes = {}
    for index, (domain, path) in enumerate(texts.items()):
        progress = _within(report, domain, index / len(texts), 1 / len(texts))
        rows = reader.sequences(path, length, _within(progress, "", 0, 0))[:sequences]
        spent = 0.0
        if index == 0:
            result["noise"] = [asdict(one) for one in reader.noise(rows, _within(progress, "", 0, _NOISE))]
            spent = _NOISE
        written_part = _WRITING if own_tokens else 0.0
        part = (1 - spent - written_part) / (1 + len(longer))
        read[domain] = _read(reader, rows, _within(progress, "", spent, part))
        nbytes[domain] = reader.text_bytes(rows)
        for name in others:
            row = compare(read[domain][base], read[domain][name], text_bytes=nbytes[domain])
            result["rows"].append({"router": name, "text": domain, "multiple": 1, "phase": "reading", **row})
        for turn, multiple in enumerate(longer):
            long = _longer(reader, path, length * multiple, len(rows) // multiple)
            if long is None:
                continue
            own = _read(reader, long, _within(progress, f"{multiple} x length", spent + part * (1 + turn), part))
            for name in others:
                row = compare(own[base], own[name], inside=length)
                result["rows"].append({"router": name, "text": domain, "multiple": multiple, "phase": "reading", **row})
        if own_tokens:
            prompts = rows[:PROMPTS, :PROMPT_TOKENS]
            passes = reader.write(prompts, own_tokens, _within(progress, "", 1 - _WRITING, _WRITING))
            found = [figures(one, reader.experts) for one in passes]
            written[domain] = dict(zip(reader.names, found, strict=True))
            for name in others:
                row = compare(written[domain][base], written[domain][name])
                result["rows"].append({"router": name, "text": domain, "multiple": 1, "phase": "writing", **row})
    for phase, by_text in ("reading", read), ("writing", written):
        if by_text:
            total = sum(nbytes.values()) if phase == "reading" else None
            result["rows"] += [
                {"router": name, "text": "all", "multiple": 1, "phase": phase, **_together(by_text, base, name, total)}
                for name in others
            ]
    _summarise(result, groups)
    return result


def _within(report: Report, name: str, start: float, share: float) -> Report:
    """Progress of a part of the work, which begins at `start` and is `share` of it."""
    return lambda text, part: report(f"{name}: {text}" if name else text, start + share * (part or 0))


def _read(reader: Reader, rows: Ids, report: Report) -> dict[str, Figures]:
    passes = reader.read(rows, report)
    return {name: figures(one, reader.experts) for name, one in zip(reader.names, passes, strict=True)}


def _longer(reader: Reader, path: Path, length: int, count: int) -> Ids | None:
    """The same text in longer sequences; None if there is too little of it for a pair."""
    try:
        rows = reader.sequences(path, length, silent)[: max(2, count)]
    except RemoeError:
        return None
    return rows


def _together(by_text: Mapping[str, Mapping[str, Figures]], base: str, name: str, nbytes: int | None) -> dict[str, Any]:
    """All texts, each with the weight of its tokens; a bootstrap draws within each."""
    old, new = ([own[side] for own in by_text.values()] for side in (base, name))
    return compare(join(old), join(new), strata=[len(part) for part in old], text_bytes=nbytes)


def _summarise(result: dict[str, Any], groups: Mapping[str, Sequence[str]]) -> None:
    """Groups with intervals over their seeds, verdicts, and the headline under fixed names."""
    totals = {(row["router"], row["phase"]): row for row in result["rows"] if row["text"] == "all"}
    result["groups"] = {}
    for group, names in groups.items():
        rows = [totals[name, "reading"] for name in names]
        own = [totals[name, "writing"] for name in names if (name, "writing") in totals]
        found: dict[str, Any] = {"routers": list(names)}
        for key in ("reuse_rate_change", "reuse_beyond_load_change", "ppl_change", "kl_mean", "load_cv_tuned"):
            found[key] = over_seeds(rows, key)
        for size in result["slots"]:
            found[f"lru_miss_change {size}"] = over_seeds([row["lru_miss_change"] for row in rows], size)
        found["writing"] = {"reuse_rate_change": over_seeds(own, "reuse_rate_change")} if own else None
        if own:
            misses = [row["lru_miss_change"] for row in own]
            found["writing"] |= {f"lru_miss_change {size}": over_seeds(misses, size) for size in result["slots"]}
        result["groups"][group] = found
    chosen = [totals[name, "reading"] for name in groups[TUNED]]
    own = [totals[name, "writing"] for name in groups[TUNED] if (name, "writing") in totals]
    controls = [totals[name, "reading"] for name in groups.get(CONTROL, ())]
    result["verdicts"] = [asdict(one) | {"text": str(one)} for one in judge(chosen, controls, own)]
    first = chosen[0]
    result |= {key: first[key] for key in ("reuse_rate_base", "ppl_base")}
    for key in ("reuse_rate_tuned", "ppl_tuned", "reuse_rate_change", "ppl_change", "kl_mean"):
        result[key] = over_seeds(chosen, key)["mean"]
    # Of several seeds: over seeds; of one: over sequences.
    result["ppl_delta_ci95"] = over_seeds(chosen, "ppl_change")["ci95"] or first["ppl_delta_ci95"]
    result["lru_miss_change"] = {
        size: float(np.mean([row["lru_miss_change"][size] for row in chosen])) for size in result["slots"]
    }
