"""Arguments that several commands take."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from remoe_edge.demo_model import resolve
from remoe_edge.runtime.llama import POLICIES, PREFETCHES, READ_MODES

_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_path(text: str) -> Path:
    """click's `type` of a MODEL: an existing file, or `demo` or `demo-tuned`, whose GGUF is written if need be."""
    return Path(_EXISTING.convert(resolve(Path(text)), None, None))


warm_option = click.option(
    "--expert-cache-warm",
    "warm",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="At the end write to FILE which experts are in the cache; at the start read those that FILE names.",
)


verify_option = click.option(
    "--expert-cache-verify",
    "verify",
    is_flag=True,
    default=None,
    help="Compare every read with a checksum of the expert: wrong bytes are read once more, then are an error. "
    "Loading reads all experts once.",
)


def _gpu_layers(ctx: click.Context, parameter: click.Parameter, text: str) -> int | str:
    if text in ("auto", "all"):
        return text
    if not text.isascii() or not text.isdigit():
        raise click.BadParameter(f"{text!r} is neither a number, nor auto or all")
    return int(text)


gpu_layers_option = click.option(
    "-ngl",
    "--gpu-layers",
    metavar="N",
    default="auto",
    show_default=True,
    callback=_gpu_layers,
    help="Layers on the GPU: a number, all, or auto: all where there is a GPU. The expert cache takes all or none.",
)


def _reader_threads(text: str) -> int | str:
    """click's `type` of a number of reader threads, or "auto"."""
    return text if text == "auto" else int(click.IntRange(1, 64)(text))


cache_threads_option = click.option(
    "--cache-threads",
    metavar="N|auto",
    type=_reader_threads,
    help="Reader threads; auto: found by reading at the first load, and remembered for the drive. [default: 4]",
)


def cache_options(command: _Command) -> _Command:
    """Options of one expert cache: budget, policy, io, prefetch, cache_threads, verify, warm."""
    options = (
        click.option(
            "--expert-cache",
            "budget",
            metavar="SIZE",
            help="Budget of the expert cache: bytes (880MiB), slots per layer (16s), auto, or off for stock llama.cpp. "
            "[default: auto; off for a model without experts]",
        ),
        click.option(
            "--policy", type=click.Choice(POLICIES), help=f"Which experts keep their slots. [default: {POLICIES[0]}]"
        ),
        click.option("--io", type=click.Choice(READ_MODES), help="How experts are read. [default: auto]"),
        click.option(
            "--prefetch",
            type=click.Choice(PREFETCHES),
            help="Read ahead what the next layer's router would choose now: always (router), or in layers where most "
            "of it is needed (auto). [default: off]",
        ),
        cache_threads_option,
        verify_option,
        warm_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def refuse(flags: Mapping[str, object], where: str) -> None:
    """Raise UsageError for the first flag that was given although it has no effect."""
    for flag, value in flags.items():
        if value is not None:
            raise click.UsageError(f"{flag} has no effect {where}.")
