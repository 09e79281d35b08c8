"""One run without each term of the loss, and the CE-only control, for several seeds, as a router was tuned."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.evaluation import CONTROL
from remoe_edge.evaluate.hf_reader import RouterState, set_router
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE
from remoe_edge.tuning.data import Sequences
from remoe_edge.tuning.export import card, write_router
from remoe_edge.tuning.train import TuneConfig, tune
from remoe_edge.tuning.weights import Weights

TERMS = ("kl", "reuse", "smooth", "lag", "window")
FULL = "full"
"""Name of the variant with the settings as they are."""

_ALL_OFF = Weights(ce=1.0, kl=0.0, reuse=0.0, smooth=0.0, lag=0.0, window=0.0)


def card_of(router: Path) -> dict[str, Any]:
    """What `remoe-edge tune` wrote into the metadata of a router. Raises RemoeError if it did not write this file."""
    try:
        with safe_open(router, "np") as file:
            said = json.loads((file.metadata() or {})["remoe_edge"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RemoeError(f"{router}: has no card of `remoe-edge tune`, whose settings are needed here") from error
    if not isinstance(said, dict) or not isinstance(said.get("settings"), dict):
        raise RemoeError(f"{router}: its card has no settings; tune it again with this version")
    return said


def settings_of(router: Path) -> tuple[TuneConfig, int]:
    """The settings that a router was tuned with, and the length of its sequences."""
    settings = dict(card_of(router)["settings"])
    known = {field.name for field in fields(TuneConfig)}
    try:
        length = int(settings.pop("length"))
        weights = Weights(**settings.pop("weights"))
        return TuneConfig(**{name: value for name, value in settings.items() if name in known}, weights=weights), length
    except (KeyError, TypeError, ValueError) as error:
        raise RemoeError(f"{router}: the settings on its card are not those of this version: {error}") from error


def held_out_of(router: Path) -> int:
    """How many sequences of its text were held out when a router was tuned."""
    return int(card_of(router).get("held_out_sequences", 32))


def variants(config: TuneConfig) -> dict[str, TuneConfig]:
    """The full loss, the control, and one for each term that has a weight, by name."""
    found = {FULL: config, CONTROL: replace(config, weights=_ALL_OFF)}
    for term in TERMS:
        if getattr(config.weights, term):
            found[f"no-{term}"] = replace(config, weights=config.weights.without(term))
    return found


def ablate(
    moe: MoE,
    base: RouterState,
    config: TuneConfig,
    train: Sequences,
    held_out: Sequences,
    *,
    folder: Path,
    model: str,
    seeds: int = 3,
    only: Sequence[str] = (),
    autocast: torch.dtype | None = None,
    report: Report = silent,
) -> dict[str, list[Path]]:
    """Tune every variant with every seed, from `base`; the router files by variant.

    They lie in `folder` when they are done and are not made again; a run that was interrupted goes on.

    Raises RemoeError for a router there that was made with other settings or other text, and for a variant that the
    settings do not have.
    """
    found = variants(config)
    if unknown := [name for name in only if name not in found]:
        raise RemoeError(f"--only: these settings have no variant {unknown[0]!r}, only {', '.join(found)}")
    wanted = {name: one for name, one in found.items() if not only or name in only}
    jobs = [(name, seed, replace(one, seed=seed)) for name, one in wanted.items() for seed in range(seeds)]
    routers: dict[str, list[Path]] = {name: [] for name in wanted}
    for index, (name, seed, one) in enumerate(jobs):
        path = folder / f"router-{name}-seed{seed}.safetensors"
        routers[name].append(path)
        if path.exists():
            _check_same(path, one, train)
            continue
        set_router(moe, base)
        begin = time.monotonic()
        result = tune(
            moe,
            train,
            held_out,
            one,
            folder=folder / f"{name}-seed{seed}.work",
            autocast=autocast,
            report=_within(report, f"tuning {name}, seed {seed}", index, len(jobs)),
        )
        said = card(result, one, model=model, data=train.files, length=train.length, held_out=len(held_out))
        said["seconds"] = round(time.monotonic() - begin, 1)
        write_router(result.router, said, path)
    set_router(moe, base)
    return routers


def _check_same(path: Path, config: TuneConfig, train: Sequences) -> None:
    said = card_of(path)
    if settings_of(path) != (config, train.length) or sorted(said["data_sha256"].values()) != sorted(
        train.files.values()
    ):
        raise RemoeError(f"{path}: was tuned with other settings or other text; choose another --output, or delete it")


def _within(report: Report, name: str, index: int, jobs: int) -> Report:
    return lambda text, part: report(f"{name}: {text}", (index + (part or 0)) / jobs)
