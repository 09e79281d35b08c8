"""What a benchmark decodes: named prompts from the package or from a user's JSONL.

A line is an object in one of these forms, told apart by its keys:

- ``{"prompt": ...}`` or ``{"text": ...}``, as in the packaged files and in HumanEval; ``"format": "chat"`` makes it a
  user's message for a chat template
- ``{"question": ...}``, GSM8K
- ``{"turns": [...]}``, MT-bench: the first turn
- ``{"conversations": [{"from": "human", "value": ...}, ...]}``, ShareGPT: the first human turn
- ``{"messages": [{"role": "user", "content": ...}, ...]}``, OpenAI: the first user message

A file may also be one JSON array of such objects, as ShareGPT is published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError

PACKAGED = ("gsm8k", "humaneval", "mt-bench", "text", "demo")
"""Workloads that come with the package."""

_MOST_PROMPTS = 64
"""A file with more has to be cut with `limit`: each prompt is decoded by every arm in every repetition."""


@dataclass(frozen=True)
class Prompt:
    """One text to go on from.

    Attributes
    ----------
    chat
        A user's message, to be put into the model's chat template where it has one; else plain text.
    source, license
        Where the text is from; None if the file does not say.
    """

    name: str
    text: str
    chat: bool = False
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Of all texts and whether they are messages: equal only for the same prompts in the same order."""
        content = [[prompt.text, prompt.chat] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def single_prompt(text: str, name: str = "prompt") -> Workload:
    """A workload of one plain text."""
    return Workload(name, (Prompt(name, text),))


def load_workload(name: str, limit: int | None = None) -> Workload:
    """A packaged workload by its name, or a user's file by its path; at most the first `limit` prompts.

    Raises RemoeError if there is no such workload, if a line has none of the known forms, or for a file of more than 64
    prompts without `limit`.
    """
    if name in PACKAGED:
        title = name
        content = (resources.files("remoe_edge") / "data" / "workloads" / f"{name}.jsonl").read_text(encoding="utf-8")
    else:
        title, content = Path(name).stem, _read(Path(name))
    entries = _entries(content, name)[:limit]
    if not entries:
        raise RemoeError(f"{name}: holds no prompts")
    if len(entries) > _MOST_PROMPTS and limit is None:
        raise RemoeError(f"{name}: has {len(entries)} prompts; say how many of them to use with --prompts")
    return Workload(title, tuple(_unique([_prompt(entry, where) for where, entry in entries])))


def _read(path: Path) -> str:
    if not path.is_file():
        raise RemoeError(f"{path}: no such workload; give a JSONL file, or one of {', '.join(PACKAGED)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RemoeError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _entries(content: str, name: str) -> list[tuple[str, Any]]:
    """Each object with where it stands."""
    if content.lstrip().startswith("["):
        try:
            return [(f"{name}, entry {index + 1}", entry) for index, entry in enumerate(json.loads(content))]
        except ValueError as error:
            raise RemoeError(f"{name}: is not JSON: {error}") from error
    entries = []
    # Not splitlines(): a JSON string may hold line separators of Unicode.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append((f"{name}, line {number}", json.loads(line)))
        except ValueError as error:
            raise RemoeError(f"{name}, line {number}: is not JSON: {error}") from error
    return entries


def _prompt(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict):
        raise RemoeError(f"{where}: is not an object with a prompt")
    text, chat = _text(entry)
    if not isinstance(text, str) or not text.strip():
        raise RemoeError(
            f"{where}: has no text; expected prompt, text, question, turns, conversations or messages, found: "
            f"{', '.join(map(str, entry)) or 'nothing'}"
        )
    names = (entry[key] for key in ("name", "task_id", "question_id", "id") if key in entry)
    license_ = entry.get("license", entry.get("licence"))
    return Prompt(
        name=str(next(names, where.rpartition("/")[2])),
        text=text,
        chat=entry["format"] == "chat" if "format" in entry else chat,
        source=_optional(entry.get("source")),
        license=_optional(license_),
    )


def _text(entry: dict[str, Any]) -> tuple[Any, bool]:
    """The text of an entry, None if there is none, and whether it is a user's message."""
    for key in "prompt", "text":
        if key in entry:
            return entry[key], False
    if "question" in entry:
        return entry["question"], True
    if "turns" in entry:
        return next(iter(_list(entry["turns"])), None), True
    for key, role, roles, value in (
        ("conversations", "from", ("human", "user"), "value"),
        ("messages", "role", ("user",), "content"),
    ):
        if key in entry:
            turns = (turn for turn in _list(entry[key]) if isinstance(turn, dict) and turn.get(role) in roles)
            return next(turns, {}).get(value), True
    return None, False


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def _unique(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Runs are matched by prompt name: a name that comes again gets a number."""
    counts: dict[str, int] = {}
    unique = []
    for prompt in prompts:
        counts[prompt.name] = counts.get(prompt.name, 0) + 1
        number = counts[prompt.name]
        unique.append(prompt if number == 1 else replace(prompt, name=f"{prompt.name} ({number})"))
    return unique
