"""What a run leaves: the tuned router, its card, and on request a whole checkpoint with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.load import versions
from remoe_edge.tuning.train import TuneConfig, TuneResult

CARD = "remoe-edge.md"
"""In a folder that `export_checkpoint` writes."""


def card(
    result: TuneResult, config: TuneConfig, *, model: str, data: Mapping[str, str], length: int, held_out: int
) -> dict[str, Any]:
    """Settings, data and figures of a run, for people and programs."""
    before, after = result.before, result.after
    return {
        "remoe_edge": __version__,
        **versions(),
        "model": model,
        "settings": {**asdict(config), "length": length},
        "data_sha256": dict(data),
        "held_out_sequences": held_out,
        "kept_step": after.step,
        "stopped": result.stopped,
        "reuse_rate": {"base": before.reuse_rate, "tuned": after.reuse_rate},
        "ppl": {"base": before.ppl, "tuned": after.ppl},
        "kl_base_tuned_nats": after.kl,
        "frozen_sha256": result.frozen_sha256,
        "checks": [asdict(check) for check in result.checks],
    }


def write_router(router: Mapping[str, Tensor], said: Mapping[str, Any], output: Path, *, force: bool = False) -> None:
    """A safetensors file of FP32 tensors under their Hugging Face names; the card is in its metadata."""
    with atomic_output(output, force=force) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in router.items()}
        # Its save_file makes a temporary file of its own, for nobody else to read, which a killed process leaves.
        temporary.write_bytes(save(tensors, {"remoe_edge": json.dumps(said, sort_keys=True)}))


def write_card(said: Mapping[str, Any], output: Path) -> None:
    """The card as Markdown, for people."""
    with atomic_output(output, force=True) as temporary:
        temporary.write_text(_card_text(said), encoding="utf-8")


def _card_text(said: Mapping[str, Any]) -> str:
    reuse, ppl = said["reuse_rate"], said["ppl"]
    rows = [
        ("reuse rate", f"{reuse['base']:.4f}", f"{reuse['tuned']:.4f}", f"{reuse['tuned'] / reuse['base'] - 1:+.1%}"),
        ("perplexity", f"{ppl['base']:.4f}", f"{ppl['tuned']:.4f}", f"{ppl['tuned'] / ppl['base'] - 1:+.2%}"),
        ("KL(base, tuned) of the next token, nats", "0", f"{said['kl_base_tuned_nats']:.5f}", ""),
    ]
    settings = {**said["settings"], **{f"weight of {k}": v for k, v in said["settings"]["weights"].items()}}
    del settings["weights"]
    text = [
        f"# Router of {said['model']}, tuned for reuse",
        "",
        f"Made by remoe-edge {said['remoe_edge']} (torch {said['torch']}, transformers {said['transformers']}). Only "
        f"router weights changed; the sha256 of all others is {said['frozen_sha256']}, before and after.",
        "",
        f"| on {said['held_out_sequences']} held-out sequences | base | tuned, step {said['kept_step']} | change |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        *(["", f"The run ended early: {said['stopped']}."] if said["stopped"] else []),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in sorted(settings.items())),
        "",
        "| data | sha256 |",
        "|---|---|",
        *(f"| {name} | {digest} |" for name, digest in said["data_sha256"].items()),
        "",
    ]
    return "\n".join(text)


def export_checkpoint(
    model: Path,
    router: Mapping[str, Tensor],
    output: Path,
    *,
    said: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    report: Report = silent,
) -> None:
    """Copy a checkpoint folder with the router's tensors replaced, each in `dtype`, by default the type it has there.

    With `said`, a card, that is there as `CARD`.

    vLLM and transformers load the result. The folder appears whole or not at all; one that is there with the same card
    was written by a run that was killed afterwards, and stays. Raises RemoeError if `output` exists otherwise, or the
    checkpoint lacks a tensor of the router.
    """
    if output.exists():
        written = output / CARD
        if said is not None and written.is_file() and written.read_text(encoding="utf-8") == _card_text(said):
            return
        raise RemoeError(f"{output} exists; choose another folder")
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        left = dict(router)
        files = sorted(path for path in model.iterdir() if path.is_file())
        for index, path in enumerate(files):
            report(f"writing {path.name}", index / len(files))
            if path.suffix != ".safetensors":
                shutil.copy2(path, temporary / path.name)
                continue
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name in left]  # noqa: SIM118
                if not names:
                    shutil.copy2(path, temporary / path.name)
                    continue
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            for name in names:
                if tensors[name].shape != left[name].shape:
                    raise RemoeError(
                        f"{path}: {name} is {list(tensors[name].shape)}, the router {list(left[name].shape)}"
                    )
                tensors[name] = left.pop(name).to(dtype or tensors[name].dtype).contiguous()
            save_file(tensors, temporary / path.name, metadata)
            shutil.copymode(path, temporary / path.name)
        if left:
            raise RemoeError(f"{model}: has no tensor '{next(iter(left))}', which the router has")
        if said is not None:
            write_card(said, temporary / CARD)
        _flush(temporary)
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise RemoeError(f"{output}: cannot be written: {error}") from error
        raise


def _flush(folder: Path) -> None:
    """Onto the disk, so that a folder that appears is whole also after a power cut."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def apply_router(moe: Any, path: Path) -> None:
    """Put a router file into a loaded model. Raises RemoeError if it is not this model's."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RemoeError(f"{path}: not a sound safetensors file: {error}") from error
    own = moe.router_parameters()
    if missing := sorted(own.keys() - tensors.keys()):
        raise RemoeError(f"{path}: has no tensor '{missing[0]}', which this model's router has")
    with torch.no_grad():
        for name, parameter in own.items():
            if tensors[name].shape != parameter.shape:
                raise RemoeError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
            parameter.copy_(tensors[name])
