"""Tasks of lm-evaluation-harness (MIT; extra `eval`), with base and tuned answers to the same items paired."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.hf_reader import HfReader
from remoe_edge.evaluate.mcnemar import mcnemar
from remoe_edge.progress import Report, silent

_METRICS = ("exact_match", "acc", "pass@1", "prompt_level_strict_acc")


def run_tasks(
    reader: HfReader,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    names: Sequence[str],
    limit: int | None = None,
    folder: Path | None = None,
    run_code: bool = False,
    chat: bool = False,
    batch: int = 8,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """McNemar tests of routers against the first of `names`, by task.

    Parameters
    ----------
    limit
        Items of each task; None: all.
    folder
        With task files of your own (YAML), beside the harness's.
    run_code
        Run programs that the model writes, as HumanEval wants.
    chat
        Put questions into the model's chat template.

    Raises RemoeError without the harness, for an unknown task, and where its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RemoeError("--tasks needs lm-evaluation-harness: pip install 'remoe-edge[eval]'") from error
    manager = TaskManager(include_path=str(folder) if folder else None)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise RemoeError(f"--tasks: the harness knows no task {unknown[0]!r}; lm-eval ls tasks lists them")
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    answers = {}
    for index, name in enumerate(names):
        report(f"tasks: {name}", index / len(names))
        with reader.router(name) as moe:
            model = HFLM(pretrained=moe.model, tokenizer=tokenizer, batch_size=batch)
            try:
                out = simple_evaluate(
                    model,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    log_samples=True,
                    apply_chat_template=chat,
                    confirm_run_unsafe_code=run_code,
                    bootstrap_iters=0,
                )
            except Exception as error:  # the harness, its tasks and the data library raise anything
                what = str(error).strip().split("\n")[0][:300]
                hint = "" if run_code or "unsafe" not in what else "; pass --run-code to run what the model writes"
                raise RemoeError(f"--tasks: lm-evaluation-harness failed: {what}{hint}") from error
        answers[name] = right_answers(out["samples"])
    return pair(answers)


def right_answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, bool]]:
    """By task and item, whether the answer was right, from the samples that the harness logs."""
    found: dict[str, dict[str, bool]] = {}
    for task, items in samples.items():
        for item in items:
            metric = next((key for key in _METRICS if key in item), None)
            if metric is None:
                raise RemoeError(f"--tasks: the items of {task} have none of {', '.join(_METRICS)} to pair")
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
