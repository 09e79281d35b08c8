"""Puts ``patches/`` onto a llama.cpp tree: own sources as whole files, hooks as unified diffs.

Diffs are applied here and not by git or patch(1), so that a fresh machine needs neither, a tree inside someone's
repository is never mistaken for it, and a refusal names the hunk.
"""

import io
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output
from remoe_edge.runtime.pin import patch_files, source_files

_OLD_FILE = re.compile(rb"--- (?:a/)?([^\t\n]+)")
_NEW_FILE = re.compile(rb"\+\+\+ (?:b/)?([^\t\n]+)")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Hunk:
    """One ``@@`` block: ``old`` lines at line ``old_start`` (from 0) become ``new`` lines at ``new_start``."""

    header: str
    old_start: int
    old: list[bytes]
    new_start: int
    new: list[bytes]

    def reversed(self) -> "Hunk":
        return Hunk(self.header, self.new_start, self.new, self.old_start, self.old)


@dataclass(frozen=True)
class FilePatch:
    """The hunks of one patch for one file; ``path`` is relative to the tree."""

    path: PurePosixPath
    hunks: list[Hunk]

    def reversed(self) -> "FilePatch":
        return FilePatch(self.path, [hunk.reversed() for hunk in self.hunks])


@dataclass(frozen=True)
class HunkFit:
    """Whether a hunk fits a tree. `moved` is by how many lines it stands elsewhere, None if it does not fit."""

    patch: str
    file: str
    number: int
    header: str
    moved: int | None


class _DoesNotFitError(Exception):
    """The message says which patch, file and hunk."""


_Contents = dict[PurePosixPath, list[bytes] | None]
"""Lines of the files that patches name; None if there is no such file."""


def parse_patch(patch: Path) -> list[FilePatch]:
    """Read a unified diff, with any text before, between and after its files, as ``git format-patch`` writes it.

    Raises RemoeError if it is malformed, or creates, deletes or renames files: new files belong in ``sources/``.
    """
    lines = _split(patch.read_bytes())
    files: list[FilePatch] = []
    at = 0
    while at + 1 < len(lines):
        old_name, new_name = _OLD_FILE.match(lines[at]), _NEW_FILE.match(lines[at + 1])
        if old_name is None or new_name is None:
            at += 1
            continue
        path = PurePosixPath(old_name[1].decode())
        if old_name[1] != new_name[1] or path.is_absolute() or ".." in path.parts:
            raise RemoeError(
                f"{patch}, line {at + 1}: only changes to a file of the tree are supported; put new files in sources/"
            )
        at += 2
        hunks: list[Hunk] = []
        while at < len(lines) and lines[at].startswith(b"@@"):
            hunk, at = _parse_hunk(patch, lines, at)
            hunks.append(hunk)
        files.append(FilePatch(path, hunks))
    if not files:
        raise RemoeError(f"{patch} has no changes in unified diff format")
    return files


def _parse_hunk(patch: Path, lines: list[bytes], at: int) -> tuple[Hunk, int]:
    header = _HUNK.match(lines[at])
    if header is None:
        raise RemoeError(f"{patch}, line {at + 1}: malformed hunk header")
    old_start, old_count, new_start, new_count = (int(n) if n is not None else 1 for n in header.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    first, at = at, at + 1
    while at < len(lines) and (len(old) < old_count or len(new) < new_count or lines[at].startswith(b"\\")):
        line = lines[at]
        # Editors strip the blank of an empty context line.
        kind, text = (b" ", line) if line in (b"\n", b"\r\n") else (line[:1], line[1:])
        if kind == b"\\":
            # "\ No newline at end of file" speaks of the line before it.
            if lines[at - 1][:1] in b" -":
                old[-1] = old[-1].removesuffix(b"\n")
            if lines[at - 1][:1] in b" +":
                new[-1] = new[-1].removesuffix(b"\n")
        elif kind not in b" -+":
            break
        if kind in b" -":
            old.append(text)
        if kind in b" +":
            new.append(text)
        at += 1
    if (len(old), len(new)) != (old_count, new_count):
        raise RemoeError(f"{patch}, line {first + 1}: the hunk does not have the lines that its header announces")
    # A side without lines starts after the line that its header names.
    return Hunk(
        header[0].decode(),
        old_start - (1 if old else 0),
        old,
        new_start - (1 if new else 0),
        new,
    ), at


def apply_patches(patches: Path, tree: Path) -> list[Path]:
    """Put everything in ``patches`` onto ``tree``; return the changed files, relative to it.

    A tree that carries all or the first of the patches already is completed. Hunks may have moved, but their lines
    must match exactly. Raises RemoeError, with the tree as it was, if a patch or source file does not fit.
    """
    changes = _source_changes(patches, tree)
    changes.update(_patch_changes(patches, tree))
    with ExitStack() as commits:
        for name, content in changes.items():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = commits.enter_context(atomic_output(target, force=True))
            temporary.write_bytes(content)
            if target.exists():
                shutil.copymode(target, temporary)
    return sorted(changes)


def fit_patches(patches: Path, tree: Path) -> tuple[list[HunkFit], list[Path]]:
    """Every hunk, and whether it fits an unpatched tree in which those before it that fit are applied; changes nothing.

    Also the own files that the tree has already.
    """
    contents: _Contents = {}
    fits = []
    for patch in patch_files(patches):
        for file in parse_patch(patch):
            if file.path not in contents:
                contents[file.path] = _read_lines(tree, file.path)
            shift = 0
            for number, hunk in enumerate(file.hunks, 1):
                lines = contents[file.path]
                at = None if lines is None else _find(hunk.old, lines, 0, hunk.old_start + shift)
                if lines is not None and at is not None:
                    contents[file.path] = lines[:at] + hunk.new + lines[at + len(hunk.old) :]
                    shift += len(hunk.new) - len(hunk.old)
                moved = None if at is None else at - (hunk.new_start if hunk.new else hunk.old_start + shift)
                fits.append(HunkFit(patch.name, str(file.path), number, hunk.header, moved))
    return fits, [name for name in source_files(patches) if (tree / name).exists()]


def _source_changes(patches: Path, tree: Path) -> dict[Path, bytes]:
    changes = {}
    for name in source_files(patches):
        content = (patches / "sources" / name).read_bytes()
        if not (tree / name).exists():
            changes[name] = content
        elif (tree / name).read_bytes() != content:
            raise RemoeError(
                f"{tree / name} exists and differs from {patches / 'sources' / name}; start from an unpatched llama.cpp"
            )
    return changes


def _patch_changes(patches: Path, tree: Path) -> dict[Path, bytes]:
    series = [(patch.name, parse_patch(patch)) for patch in patch_files(patches)]
    original = {file.path: _read_lines(tree, file.path) for _, files in series for file in files}
    misfit = None
    for carried in range(len(series) + 1):
        try:
            patched = _complete(series, carried, original)
        except _DoesNotFitError as error:
            misfit = misfit or error
            continue
        return {
            Path(path): b"".join(lines)
            for path, lines in patched.items()
            if lines is not None and lines != original[path]
        }
    raise RemoeError(f"{tree} does not take the patches: {misfit}")


def _complete(series: list[tuple[str, list[FilePatch]]], carried: int, original: _Contents) -> _Contents:
    """Patched files, if ``original`` carries the first ``carried`` patches: these come off again, the rest goes on."""
    unpatched = dict(original)
    for name, files in reversed(series[:carried]):
        for file in files:
            unpatched[file.path] = _apply(name, file.reversed(), unpatched[file.path])
    patched = dict(original)
    for name, files in series[carried:]:
        for file in files:
            patched[file.path] = _apply(name, file, patched[file.path])
    return patched


def _read_lines(tree: Path, path: PurePosixPath) -> list[bytes] | None:
    try:
        return _split((tree / path).read_bytes())
    except FileNotFoundError:
        return None


def _apply(name: str, file: FilePatch, lines: list[bytes] | None) -> list[bytes]:
    if lines is None:
        raise _DoesNotFitError(f"{name} changes {file.path}, which is missing")
    result: list[bytes] = []
    done = moved = 0
    for number, hunk in enumerate(file.hunks, 1):
        at = _find(hunk.old, lines, done, hunk.old_start + moved)
        if at is None:
            raise _DoesNotFitError(
                f"hunk {number} of {len(file.hunks)} ({hunk.header}) of {name} does not fit {file.path}"
            )
        result += lines[done:at] + hunk.new
        done, moved = at + len(hunk.old), at - hunk.old_start
    return result + lines[done:]


def _find(wanted: list[bytes], lines: list[bytes], first: int, expected: int) -> int | None:
    """Where ``wanted`` stands in ``lines`` from ``first`` on, as near as possible to ``expected``."""
    size = len(wanted)
    places = (at for at in range(first, len(lines) - size + 1) if lines[at : at + size] == wanted)
    return min(places, key=lambda at: abs(at - expected), default=None)


def _split(content: bytes) -> list[bytes]:
    # Unlike splitlines, this leaves a lone carriage return inside its line.
    return io.BytesIO(content).readlines()
