"""Tasks of lm-evaluation-harness (MIT; extra `eval`), with base and tuned answers to the same items paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.compare import mcnemar
from remoe_edge.evaluate.passes import RouterState, set_router
from remoe_edge.tuning.adapters import MoE


def run_tasks(
    moe: MoE, tokenizer: Any, routers: Mapping[str, RouterState], tasks: Sequence[str], *, limit: int | None = None
) -> list[dict[str, Any]]:
    """McNemar tests of every router against the first, by task; needs the harness and its data at hand."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RemoeError("--tasks needs lm-evaluation-harness: pip install 'remoe-edge[eval]'") from error
    answers = {}
    for name, router in routers.items():
        set_router(moe, router)
        out = simple_evaluate(
            HFLM(pretrained=moe.model, tokenizer=tokenizer), tasks=list(tasks), limit=limit, log_samples=True
        )
        answers[name] = right_answers(out["samples"])
    return pair(answers)


def right_answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, bool]]:
    """By task and item, whether the answer was right, from the samples that the harness logs."""
    found: dict[str, dict[str, bool]] = {}
    for task, items in samples.items():
        for item in items:
            metric = next((key for key in ("exact_match", "acc", "pass@1") if key in item), None)
            if metric is None:
                raise RemoeError(f"{task}: its items have no exact_match, acc or pass@1 to pair")
            # One item may be scored under several filters: the strictest comes first.
            found.setdefault(task, {}).setdefault(str(item["doc_id"]), bool(item[metric]))
    return found


def pair(answers: Mapping[str, Mapping[str, Mapping[str, bool]]]) -> list[dict[str, Any]]:
    """Rows for every router but the first, items paired by their number."""
    base, *others = answers
    rows = []
    for name in others:
        for task, items in answers[name].items():
            shared = [item for item in items if item in answers[base][task]]
            old, new = ([answers[side][task][item] for item in shared] for side in (base, name))
            rows.append({"task": task, "router": name, **mcnemar(old, new)})
    return rows
