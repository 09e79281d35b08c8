"""One run without each term of the loss, and the CE-only control, for several seeds, as a router was tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.passes import RouterState, set_router
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE
from remoe_edge.tuning.data import Sequences
from remoe_edge.tuning.export import card, write_router
from remoe_edge.tuning.losses import Weights
from remoe_edge.tuning.train import TuneConfig, tune

CONTROL = Weights(ce=1.0, kl=0.0, reuse=0.0, smooth=0.0, lag=0.0, window=0.0)


def card_of(router: Path) -> dict[str, Any]:
    """What `remoe-edge tune` wrote into the metadata of a router. Raises RemoeError if it did not write this file."""
    try:
        with safe_open(router, "np") as file:
            said = json.loads((file.metadata() or {})["remoe_edge"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RemoeError(f"{router}: has no card of `remoe-edge tune`, whose settings are needed here") from error
    assert isinstance(said, dict)
    return said


def settings_of(router: Path) -> tuple[TuneConfig, int]:
    """The settings that a router was tuned with, and the length of its sequences."""
    settings = dict(card_of(router)["settings"])
    length = int(settings.pop("length"))
    return TuneConfig(**{**settings, "weights": Weights(**settings["weights"])}), length


def variants(config: TuneConfig) -> dict[str, TuneConfig]:
    """The full loss, the control, and one for each term that has a weight, by name."""
    found = {"full": config, "ce-only": replace(config, weights=CONTROL)}
    for term in ("kl", "reuse", "smooth", "lag", "window"):
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
) -> dict[str, RouterState]:
    """Tune every variant with every seed, from `base`; the routers by name, "full-seed0" first.

    Each lies in `folder` when it is done, and is not made again; a run that was interrupted goes on.
    """
    wanted = {name: one for name, one in variants(config).items() if not only or name in only}
    jobs = [(f"{name}-seed{seed}", replace(one, seed=seed)) for name, one in wanted.items() for seed in range(seeds)]
    routers: dict[str, RouterState] = {}
    for index, (name, one) in enumerate(jobs):
        path = folder / f"router-{name}.safetensors"
        if not path.exists():
            set_router(moe, base)
            result = tune(
                moe,
                train,
                held_out,
                one,
                folder=folder / f"{name}.work",
                autocast=autocast,
                report=_within(report, name, index, len(jobs)),
            )
            said = card(result, one, model=model, data=train.files, length=train.length, held_out=len(held_out))
            write_router(result.router, said, path)
        routers[name] = load_file(path)
    set_router(moe, base)
    return routers


def _within(report: Report, name: str, index: int, jobs: int) -> Report:
    return lambda text, part: report(f"{name}, {text}", (index + (part or 0)) / jobs)


def groups(
    routers: Mapping[str, RouterState],
) -> tuple[dict[str, RouterState], dict[str, RouterState], dict[str, RouterState]]:
    """Full loss, control, and the rest."""
    full = {name: r for name, r in routers.items() if name.startswith("full")}
    control = {name: r for name, r in routers.items() if name.startswith("ce-only")}
    rest = {name: r for name, r in routers.items() if name not in full and name not in control}
    return full, control, rest
