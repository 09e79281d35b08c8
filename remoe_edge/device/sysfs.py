"""Values from the files by which a Linux kernel tells about the machine."""

from pathlib import Path


def text(path: Path) -> str | None:
    """The file's text without white space and zero bytes around it; None if there is none, or it cannot be read."""
    try:
        return path.read_text(errors="replace").strip(" \t\n\0") or None
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The whole number in the file; None if there is none, or it cannot be read."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None
