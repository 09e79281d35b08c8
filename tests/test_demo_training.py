"""The scripts that made the demo model: its text, the n-gram model it is held against, and training that can go on."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from demo_corpus import encode, learn_tokenizer, read_corpus  # noqa: E402
from ngram_baseline import KneserNey  # noqa: E402

WORDS = ["the", "small", "red", "fox", "ran", "over", "hill", "and", "saw", "one", "blue", "bird", "river", "night"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources in the form of the real ones, of made-up words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    with gzip.open(folder / "stories.txt.gz", "wt") as file:
        file.write("\n\n".join(words(120) for _ in range(100)))
    with gzip.open(folder / "enwik8.gz", "wt") as file:
        file.writelines(
            f"<page><text xml:space=\"preserve\">'''Fox''' {{{{box|x=1}}}} {words(100)} [[hill|hills]]\n* item"
            "</text></page>"
            for _ in range(60)
        )
    lines = [json.dumps({"question": words(40), "answer": "#### 4"}) for _ in range(100)]
    (folder / "gsm8k_train.jsonl").write_text("\n".join(lines))
    tasks = [{"instruction": words(9), "input": "", "response": words(60)} for _ in range(100)]
    (folder / "gpteacher_codegen.json").write_text(json.dumps(tasks))
    return folder


def test_corpus_parts_are_disjoint_plain_and_survive_the_tokenizer(text: Path) -> None:
    domains = read_corpus(text)
    assert set(domains) == {"stories", "wiki", "maths", "code"}
    tokenizer = learn_tokenizer(domains, 400)
    for domain in domains.values():
        assert not set(domain.train) & set(domain.held_out)
        assert len(domain.held_out) == (len(domain.train) + len(domain.held_out)) // 25
        ids = encode(tokenizer, domain.held_out)
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded.split("<|endoftext|>")[:-1] == domain.held_out
    article = domains["wiki"].train[0]
    assert "hills" in article
    assert not set("[]{}'*") & set(article)


def test_kneser_ney_is_a_distribution_and_learns_what_follows() -> None:
    rng = np.random.default_rng(0)
    chain = [0]
    for _ in range(4000):
        # Each token is followed by its successor four times out of five.
        chain.append((chain[-1] + 1) % 7 if rng.random() < 0.8 else int(rng.integers(7)))
    model = KneserNey(np.array(chain), 7, order=3)
    for context in ([1, 2], [6, 6], [3, 0]):
        p = np.array([model.probabilities(np.array([*context, word]))[0] for word in range(7)])
        assert p.sum() == pytest.approx(1, abs=1e-9)
        assert (p > 0).all()
        assert p.argmax() == (context[-1] + 1) % 7
        assert p.max() == pytest.approx(0.8 + 0.2 / 7, abs=0.1)


def test_training_goes_on_as_if_it_had_not_stopped(text: Path, tmp_path: Path) -> None:
    def train(work: Path, steps: int) -> None:
        arguments = ["--text", text, "--work", work, "--steps", steps, "--decay", 1, "--batch", 512]
        arguments += ["--length", 32, "--save-every", 1]
        command = [sys.executable, "-W", "ignore", SCRIPTS / "train_demo_model.py", *arguments]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr

    train(tmp_path / "at once", 3)
    train(tmp_path / "in parts", 2)
    train(tmp_path / "in parts", 3)
    once, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("at once", "in parts"))
    assert once.read_bytes() == parts.read_bytes()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "at once" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
