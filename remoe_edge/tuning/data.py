"""Text to tune on: files into sequences of token ids.

A file is one of these, told apart by its content; `.gz` is decompressed:

- plain text, UTF-8
- JSON Lines or one JSON array of objects with `text`; or `messages` (OpenAI) or `conversations` (ShareGPT); or a pair
  such as `prompt`/`response`, `question`/`answer` (GSM8K), `instruction`/`input`/`response` (GPTeacher, Alpaca)

Dialogues and pairs go through the model's chat template; a tokenizer without one gets the texts one after the other.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_edge.errors import RemoeError
from remoe_edge.progress import Report, silent

MAX_FILE_BYTES = 4 << 30
_PIECE = 1 << 16
"""Characters given to the tokenizer at once: its memory grows with them."""
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
)

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """A piece of a document; `learn` says whether its tokens count in the cross entropy."""

    text: str
    learn: bool = True


@dataclass(frozen=True, eq=False)
class Sequences:
    """Packed text.

    Attributes
    ----------
    ids
        [rows, length + 1]: each row predicts its last `length` tokens from the ones before.
    learn
        [rows, length]: which of these count.
    files
        sha256 by path.
    """

    ids: Ids
    learn: Mask
    files: dict[str, str]

    @property
    def length(self) -> int:
        return int(self.ids.shape[1]) - 1

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice | Ids) -> Sequences:
        return Sequences(self.ids[rows], self.learn[rows], self.files)

    def split(self, held_out: int, seed: int = 0) -> tuple[Sequences, Sequences]:
        """What to train on and `held_out` rows beside it, drawn from all over the text, so that each file has its part.

        Raises RemoeError if that leaves nothing to train on.
        """
        if len(self) <= held_out:
            raise RemoeError(
                f"{len(self)} sequences of {self.length} tokens leave nothing to train on beside {held_out} held out; "
                "give more text, a smaller --length or --held-out"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        return self.part(np.sort(order[held_out:])), self.part(np.sort(order[:held_out]))


def load_sequences(
    paths: Sequence[Path], tokenizer: Any, length: int, *, responses_only: bool = False, report: Report = silent
) -> Sequences:
    """Documents of all files, one after the other with the end token between, cut into rows of `length` tokens.

    The rest at the end is dropped. With `responses_only` the cross entropy counts answers only; plain text then counts
    nothing and is refused. Raises RemoeError, naming file and line, for what cannot be read, and for too little text.
    """
    ids: list[npt.NDArray[np.int32]] = []
    learn: list[Mask] = []
    files = {}
    for index, path in enumerate(paths):
        content, digest = _read(path)
        files[str(path)] = digest
        # What the tokenizer puts before a text; templates write it themselves.
        begin, end = tokenizer("")["input_ids"], tokenizer.eos_token_id
        for done, parts in _documents(content, path, tokenizer):
            if responses_only and parts and all(part.learn for part in parts):
                raise RemoeError(
                    f"{path}: has text in which answers cannot be told apart (plain text, or a chat template that "
                    "rewrites earlier turns); leave out --responses-only"
                )
            if begin and parts and not parts[0].text.startswith(tokenizer.bos_token or "\0"):
                ids.append(np.asarray(begin, np.int32))
                learn.append(np.full(len(begin), not responses_only))
            for part in parts:
                for start, text in _pieces(part.text):
                    # A document of one text is the whole file, and may be long.
                    inside = start / len(part.text) if len(parts) == 1 else 0.0
                    report(f"reading {path.name}", (index + max(done, inside)) / len(paths))
                    # Cut into sequences below, so that none is too long for the model, of which it would warn.
                    piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                    ids.append(np.asarray(piece, np.int32))
                    learn.append(np.full(len(piece), part.learn or not responses_only))
            if end is not None:
                ids.append(np.array([end], np.int32))
                learn.append(np.ones(1, np.bool_))
    stream = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    rows = (len(stream) - 1) // length
    if rows < 2:
        raise RemoeError(
            f"{', '.join(map(str, paths))}: {len(stream)} tokens are too few for two sequences of {length}; "
            "give more text or a smaller --length"
        )
    kept = np.concatenate(learn)
    # Rows overlap by one token, so that each token but the first is predicted once.
    blocks = np.stack([stream[row * length : (row + 1) * length + 1] for row in range(rows)]).astype(np.int64)
    return Sequences(blocks, kept[1 : rows * length + 1].reshape(rows, length), files)


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that begin with a space or line feed where there is one, each with its first character."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            end = space if space > 0 else end
        yield start, text[start:end]
        start = end


def _read(path: Path) -> tuple[str, str]:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RemoeError(f"{path}: has {size} bytes, more than {MAX_FILE_BYTES}; split it")
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise RemoeError(f"{path}: cannot be read: {error}") from error
    if not data.strip():
        raise RemoeError(f"{path}: is empty")
    try:
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as error:
        raise RemoeError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _documents(content: str, path: Path, tokenizer: Any) -> Iterator[tuple[float, list[Part]]]:
    """Each document in parts, and how much of the file is done before it."""
    name = path.name.removesuffix(".gz")
    start = content.lstrip()[:1]
    if name.endswith((".jsonl", ".ndjson")) or (start == "{" and name.endswith(".json")):
        lines = content.split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield (number - 1) / len(lines), _parts(_json(line, where), where, tokenizer)
    elif name.endswith(".json"):
        items = _json(content, str(path))
        if not isinstance(items, list):
            raise RemoeError(f"{path}: is neither JSON Lines nor a JSON array of objects")
        for number, item in enumerate(items, 1):
            yield (number - 1) / len(items), _parts(item, f"{path}, entry {number}", tokenizer)
    else:
        yield 0.0, [Part(content)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoeError(f"{where}: is not JSON: {error}") from error


def _parts(item: Any, where: str, tokenizer: Any) -> list[Part]:
    if isinstance(item, dict):
        if isinstance(item.get("text"), str):
            return [Part(item["text"])]
        messages = _messages(item, where)
        if messages:
            return _chat(messages, where, tokenizer)
    raise RemoeError(
        f"{where}: has no text; expected an object with text, messages, conversations, or a pair "
        "such as prompt and response"
    )


def _messages(item: dict[str, Any], where: str) -> list[dict[str, str]]:
    if isinstance(item.get("messages"), list):
        turns = [(turn.get("role"), turn.get("content")) for turn in item["messages"] if isinstance(turn, dict)]
    elif isinstance(item.get("conversations"), list):
        roles = {"human": "user", "gpt": "assistant"}
        turns = [
            (roles.get(str(turn.get("from")), turn.get("from")), turn.get("value"))
            for turn in item["conversations"]
            if isinstance(turn, dict)
        ]
    else:
        for question, answer in _PAIRS:
            if isinstance(item.get(question), str) and isinstance(item.get(answer), str):
                asked = "\n".join(part for part in (item[question], item.get("input")) if part)
                turns = [("user", asked), ("assistant", item[answer])]
                break
        else:
            return []
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in turns):
        raise RemoeError(f"{where}: a message has no role or no content")
    return [{"role": str(role), "content": str(content)} for role, content in turns]


def _chat(messages: list[dict[str, str]], where: str, tokenizer: Any) -> list[Part]:
    """The dialogue as the model's template writes it; answers are what an assistant says."""
    if tokenizer.chat_template is None:
        return [Part(message["content"] + "\n", message["role"] == "assistant") for message in messages]
    parts: list[Part] = []
    before = ""
    try:
        for index, message in enumerate(messages):
            # With the header of an answer, so that only what the model has to say itself counts.
            if message["role"] == "assistant":
                asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                parts.append(Part(asked[len(before) :], False))
                before = asked
            text = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            if not text.startswith(before):
                # Templates may rewrite earlier turns; then only the whole is certain.
                whole = tokenizer.apply_chat_template(messages, tokenize=False)
                return [Part(whole)]
            parts.append(Part(text[len(before) :], message["role"] == "assistant"))
            before = text
    except Exception as error:  # templates are programs of strangers: they may raise anything
        raise RemoeError(f"{where}: the model's chat template refuses this dialogue: {error}") from error
    return [part for part in parts if part.text]
