"""State of the machine that results depend on: power mode, clocks, temperatures, throttling, fan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Snapshot = dict[str, Any]
"""Plain values for a result row; None where the machine does not tell."""


def snapshot(root: Path = Path("/")) -> Snapshot:
    """The state now, for a result row. Keys are the same on every machine; None is "not known". Takes milliseconds."""
    raise NotImplementedError


def same_mode(before: Snapshot, after: Snapshot) -> str | None:
    """None if both were taken in the same power mode; else a sentence that says what changed: the run is invalid."""
    raise NotImplementedError


def temperature(root: Path = Path("/")) -> float | None:
    """Degrees Celsius of the hottest part of the chip, for a cool-down; None if there is no sensor."""
    raise NotImplementedError
