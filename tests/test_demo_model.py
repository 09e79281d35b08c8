"""The packaged demo model: whole, as its card says, and the same GGUF with torch and without."""

import hashlib
import json
from pathlib import Path

import pytest
from gguf import GGUFReader

from remoe_edge.demo_model import (
    demo_checkpoint,
    demo_gguf,
    demo_router,
    demo_texts,
    demo_tuning_text,
    resolve,
    write_checkpoint,
)
from remoe_edge.gguf_io.router import read_router
from remoe_edge.gguf_io.source import Source
from remoe_edge.runtime.llama import open_model

CARD = json.loads((demo_checkpoint().parent / "card.json").read_text())


def test_files_are_those_of_the_card() -> None:
    for name, digest in CARD["sha256"].items():
        assert hashlib.sha256((demo_checkpoint().parent / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in demo_checkpoint().iterdir()) < 30e6
    assert set(demo_texts()) == {"stories", "wiki", "maths", "code", "shakespeare"}
    assert demo_tuning_text().is_file()


def test_the_card_shows_a_model_and_not_noise() -> None:
    for domain, row in CARD["held_out"].items():
        assert row["bits_per_byte"] < 0.92 * CARD["ngram_5_bits_per_byte"][domain], domain
        assert row["reuse_rate"] > 2 * CARD["chance_reuse_rate"], domain
    pairs = zip(CARD["specialisation"]["bits"], CARD["specialisation"]["chance_bits"], strict=True)
    assert all(bits > 100 * chance for bits, chance in pairs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tuned_routers_fit_and_say_how_they_were_made(seed: int) -> None:
    assert len(read_router(demo_router(seed)).tensors) == 8
    with Source.of(demo_router(seed)).open() as file:
        source = Source.of(demo_router(seed))
        size = int.from_bytes(source.read(file, 0, 8), "little")
        card = json.loads(json.loads(source.read(file, 8, size))["__metadata__"]["remoe_edge"])
    assert card["settings"]["seed"] == seed
    assert card["reuse_rate"]["tuned"] > 1.26 * card["reuse_rate"]["base"]
    assert abs(card["ppl"]["tuned"] / card["ppl"]["base"] - 1) <= 0.01


def test_demo_is_a_word_only_where_no_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    base, tuned = resolve(Path("demo")), resolve(Path("demo-tuned"))
    assert base.name == "demo.gguf"
    assert tuned.name == "demo-tuned.gguf"
    router = "blk.3.ffn_gate_inp.weight"
    one, two = ({t.name: t for t in GGUFReader(path).tensors} for path in (base, tuned))
    assert one.keys() == two.keys()
    changed = {name for name in one if (one[name].data != two[name].data).any()}
    assert changed == {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(8)}
    assert router in changed
    Path("demo").write_text("mine")
    assert resolve(Path("demo")) == Path("demo")


@pytest.mark.runtime
def test_gguf_is_what_the_converter_makes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from remoe_edge.gguf_io.from_hf import from_hf

    write_checkpoint(demo_checkpoint(), tmp_path / "own.gguf")
    from_hf(demo_checkpoint(), tmp_path / "theirs.gguf", quant="BF16")
    own, theirs = GGUFReader(tmp_path / "own.gguf"), GGUFReader(tmp_path / "theirs.gguf")
    one, two = ({t.name: t for t in reader.tensors} for reader in (own, theirs))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.tensor_type == two[name].tensor_type, name
        assert (tensor.data == two[name].data).all(), name
    keys, others = ({key: field.contents() for key, field in reader.fields.items()} for reader in (own, theirs))
    for key in keys.keys() | others.keys():
        # The header's own counts, and what names the model.
        if not key.startswith(("GGUF.", "general.")):
            assert keys.get(key) == others.get(key), key


@pytest.mark.runtime
def test_it_writes_english() -> None:
    with open_model(demo_gguf(), n_ctx=256) as session:
        session.decode(session.tokenize("Once upon a time, there was a little"))
        text = session.detokenize(list(session.generate(60)))
    words = text.split()
    assert len(words) > 25
    common = {"the", "and", "to", "a", "was", "she", "he", "her", "his", "with", "in", "it"}
    assert sum(word.strip('.,!?"').lower() in common for word in words) > len(words) / 5
