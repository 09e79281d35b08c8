"""The text of the demo model: four domains, training and held-out parts, and the tokenizer learned from them.

Sources, all openly licensed, expected in one folder: `stories.txt.gz` (sampled from stories15M, MIT), `enwik8.gz`
(Wikipedia, CC BY-SA), `gsm8k_train.jsonl` (MIT), `gpteacher_codegen.json` (GPTeacher, MIT). The last 25th of each
domain is held out: no model and no tokenizer of ours is trained on it.
"""

import gzip
import html
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
WIKI_BYTES = 6_000_000
"""Of clean Wikipedia text; all of it would drown what a small model can learn."""
EVALUATION_BYTES = {"stories": 400_000, "wiki": 200_000, "maths": 80_000, "code": 36_000}
"""Held-out text that is kept for evaluation."""
HELD_OUT = 25
"""One document in so many is held out."""


@dataclass(frozen=True)
class Domain:
    """Documents of one domain."""

    train: list[str]
    held_out: list[str]


def read_unseen(folder: Path) -> dict[str, list[str]]:
    """Text to tune routers on, which the model was not trained on, as a user's would be: by domain.

    What is held out and not kept for evaluation (the first `EVALUATION_BYTES` of each domain are), and articles after
    those of the corpus.
    """
    unseen = {}
    for name, domain in read_corpus(folder).items():
        kept = 0
        count = 0
        for document in domain.held_out:
            kept += len(document.encode())
            count += 1
            if kept > EVALUATION_BYTES[name]:
                break
        unseen[name] = domain.held_out[count:]
    unseen["wiki"] = list(_wiki(folder, WIKI_BYTES, WIKI_BYTES + 600_000))
    return unseen


def read_corpus(folder: Path) -> dict[str, Domain]:
    """All domains, by name."""
    sources = {"stories": _stories, "wiki": _wiki, "maths": _maths, "code": _code}
    domains = {}
    for name, read in sources.items():
        documents = list(read(folder))
        cut = len(documents) - len(documents) // HELD_OUT
        domains[name] = Domain(documents[:cut], documents[cut:])
    return domains


def learn_tokenizer(domains: dict[str, Domain], size: int) -> Tokenizer:
    """A byte-level BPE as GPT-2's, with `size` entries, from the training parts."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's pattern: llama.cpp has it too, so that a GGUF splits text in the same way.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # Every domain has the same say in the vocabulary, whatever its size.
    share = min(sum(map(len, domain.train)) for domain in domains.values())
    tokenizer.train_from_iterator((text for d in domains.values() for text in _first(d.train, share)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], seed: int | None = None) -> np.ndarray:
    """The documents as one row of token ids [tokens] uint16, an END after each; shuffled if there is a seed."""
    documents = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    end = tokenizer.token_to_id(END)
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])


def _first(documents: list[str], characters: int) -> Iterator[str]:
    for document in documents:
        if characters <= 0:
            return
        yield document
        characters -= len(document)


def _stories(folder: Path) -> Iterator[str]:
    with gzip.open(folder / "stories.txt.gz", "rt", encoding="utf-8") as file:
        for story in file.read().split("\n\n"):
            # The sampler stops some stories in the middle of a sentence; their last line goes.
            text = story.strip()
            if len(text) > 200:
                yield text


def _wiki(folder: Path, start: int = 0, end: int = WIKI_BYTES) -> Iterator[str]:
    size = 0
    with gzip.open(folder / "enwik8.gz", "rt", encoding="utf-8", errors="replace") as file:
        data = file.read(60_000_000)
    for page in re.finditer(r"<text[^>]*>(.*?)</text>", data, re.DOTALL):
        paragraphs = [p for p in _plain(page[1]).split("\n") if len(p) > 200]
        if paragraphs:
            text = "\n".join(paragraphs)[:8000]
            if size > start or start == 0:
                yield text
            size += len(text)
        if size > end:
            return


def _plain(markup: str) -> str:
    """Wiki markup without what is no prose."""
    text = html.unescape(html.unescape(markup))
    text = re.sub(r"<!--.*?-->|<ref.*?</ref>|<math>.*?</math>|\{\|.*?\|\}", "", text, flags=re.DOTALL)
    for _ in range(3):
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*:[^\[\]]*)\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|&\w+;", "", text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line and line[0] not in "*#=|{}!:;")


def _maths(folder: Path) -> Iterator[str]:
    for line in (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        yield f"Question: {item['question']}\nAnswer: {item['answer']}"


def _code(folder: Path) -> Iterator[str]:
    for item in json.loads((folder / "gpteacher_codegen.json").read_text(encoding="utf-8")):
        task = "\n".join(part for part in (item["instruction"], item["input"]) if part)
        yield f"Instruction: {task}\nResponse: {item['response']}"
