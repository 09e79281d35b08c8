"""Arguments that several commands take."""

from pathlib import Path

import click

from remoe_edge.demo_model import resolve

_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


def model_path(text: str) -> Path:
    """click's `type` of a MODEL: an existing file, or `demo` or `demo-tuned`, whose GGUF is written if need be."""
    return Path(_EXISTING.convert(resolve(Path(text)), None, None))
