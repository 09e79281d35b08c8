"""`eval` on GGUFs: the same figures as of the checkpoint, and perplexity against bytes per token."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from tiny_hf import tiny_model  # noqa: E402
from tiny_models import write_tiny_model  # noqa: E402

from remoe_edge.cli import cli  # noqa: E402
from remoe_edge.errors import RemoeError  # noqa: E402
from remoe_edge.evaluate.as_gguf import base_gguf, is_gguf, tuned_gguf  # noqa: E402
from remoe_edge.evaluate.frontier import in_words, measure_frontier, plan_frontier  # noqa: E402
from remoe_edge.evaluate.gguf_reader import open_ggufs  # noqa: E402
from remoe_edge.evaluate.hf_reader import HfReader, router_from, router_state  # noqa: E402
from remoe_edge.evaluate.reader import moved  # noqa: E402
from remoe_edge.progress import silent  # noqa: E402
from remoe_edge.tuning.adapters import adapt  # noqa: E402
from remoe_edge.tuning.load import load_model, load_tokenizer  # noqa: E402

pytestmark = pytest.mark.runtime

WORDS = "the router of a model chooses experts for each token and neighbours reuse them when nothing is read"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model`, its changed router, both as GGUF, and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint = tiny_model("olmoe", folder / "model")
    moe = adapt(load_model(str(checkpoint)).eval())
    torch.manual_seed(1)
    router = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in router_state(moe).items()}
    save_file(router, folder / "router.safetensors")
    text = " ".join(np.random.default_rng(0).choice(WORDS.split(), 300))
    (folder / "prose.txt").write_text(text, encoding="utf-8")
    base_gguf(checkpoint, folder, quant="F32")
    (folder / "base-f32.gguf").rename(folder / "base.gguf")
    tuned_gguf(folder / "base.gguf", folder / "router.safetensors", folder)
    return folder


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_gguf_is_read_as_its_checkpoint_is(place: Path) -> None:
    moe = adapt(load_model(str(place / "model")).eval())
    base = router_state(moe)
    routers = {"base": base, "tuned": router_from(moe, place / "router.safetensors")}
    hf = HfReader(moe, load_tokenizer(str(place / "model")), routers)
    with open_ggufs({"base": place / "base.gguf", "tuned": place / "router.gguf"}, threads=1) as gguf:
        rows = gguf.sequences(place / "prose.txt", 150)[:2]
        assert (rows == hf.sequences(place / "prose.txt", 150)[:2]).all()
        assert gguf.text_bytes(rows) == hf.text_bytes(rows)
        assert (gguf.layers, gguf.experts, gguf.top_k) == (hf.layers, hf.experts, hf.top_k)
        for one, other in zip(gguf.read(rows), hf.read(rows), strict=True):
            assert one.nll == pytest.approx(other.nll, abs=0.05)
            assert one.nll.mean() == pytest.approx(other.nll.mean(), abs=2e-3)
            assert moved(one.ids, other.ids) < 0.02
            if other.kl is not None:
                assert one.kl.mean() == pytest.approx(other.kl.mean(), rel=0.05)
        for one, other in zip(gguf.write(rows[:, :8], 6), hf.write(rows[:, :8], 6), strict=True):
            assert one.ids.shape == (2, 6, 2, 2)
            assert moved(one.ids, other.ids) < 0.1
        (noise,) = gguf.noise(rows)
        assert noise.kl_mean < 1e-5


def test_the_command_takes_ggufs(place: Path, tmp_path: Path) -> None:
    given = ["--text", place / "prose.txt", "--length", 24, "--sequences", 4, "--own-tokens", 4, "-t", 1]
    result = json.loads(invoke(place / "base.gguf", place / "router.gguf", *given, "--json"))
    assert result["model_type"] == "olmoe"
    assert result["kl_mean"] > 0
    assert result["rows"][0]["routing_entropy_base"] is None
    # A router alone is put into a copy of the base; a cache changes nothing.
    cached = ["--expert-cache", "4s", "-o", tmp_path / "out", "--json"]
    again = json.loads(invoke(place / "base.gguf", place / "router.safetensors", *given, *cached))
    assert again["ppl_tuned"] == result["ppl_tuned"]
    assert again["lru_miss_change"] == result["lru_miss_change"]
    assert not list((tmp_path / "out").glob("**/*.gguf"))
    assert "not known" in (tmp_path / "out" / "eval.md").read_text()


def test_other_models_are_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_tiny_model(other, "olmoe")
    assert is_gguf(other)
    with pytest.raises(RemoeError, match="is not the model of"), open_ggufs({"a": place / "base.gguf", "b": other}):
        pass


class TestFrontier:
    def test_bytes_fall_and_perplexity_is_measured(self, place: Path, tmp_path: Path) -> None:
        command = [place / "base.gguf", place / "router.safetensors", "--text", place / "prose.txt", "--frontier"]
        command += ["--length", 40, "--slots", 2, "--slots", 3, "-t", 1, "-o", tmp_path / "out"]
        found = json.loads(invoke(*command, "--bias", 0.2, "--bias", 1, "--json"))
        points = {(p["side"], p["slots"], p["route_bias"]): p for p in found["points"]}
        assert len(points) == 12
        for side in "base", "tuned":
            # Without bias the output is exact: perplexity does not depend on what is in memory.
            assert points[side, 2, 0]["nll_by_sequence"] == points[side, 3, 0]["nll_by_sequence"]
            assert points[side, 3, 0]["bytes_per_token"] < points[side, 2, 0]["bytes_per_token"]
            for slots in 2, 3:
                line = [points[side, slots, bias] for bias in (0, 0.2, 1)]
                assert line[0]["bytes_per_token"] > line[1]["bytes_per_token"] > line[2]["bytes_per_token"]
                assert line[2]["ppl"] != line[0]["ppl"]
        assert points["base", 2, 0]["ppl_change"] == 0
        assert points["tuned", 2, 0]["ppl_change"] != 0
        low, high = points["base", 2, 1]["ppl_change_ci95"]
        assert low <= points["base", 2, 1]["ppl_change"] <= high
        assert found["summary"] == in_words(found["points"])
        assert "2 of 8 experts in memory" in (tmp_path / "out" / "frontier.md").read_text()
        assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")

    def test_it_goes_on_where_it_was(self, place: Path, tmp_path: Path) -> None:
        def plan(length: int, biases: list[float]):
            models = place / "base.gguf", place / "router.gguf"
            return plan_frontier(
                *models, {"prose": place / "prose.txt"}, slots=[2], biases=biases, length=length, threads=1
            )

        output = tmp_path / "frontier.jsonl"
        first = measure_frontier(plan(40, [0.2]), output)
        lines = output.read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + len(first) == 5
        # Two points measured, the third cut off by a crash; one bias more than before.
        output.write_bytes(b"".join(lines[:3]) + lines[3][:20])
        done: list[str] = []
        again = measure_frontier(plan(40, [0.2, 1.0]), output, report=lambda text, _part: done.append(text))
        assert set(done) == {f"{side}, 2 slots, bias {bias}" for side in ("base", "tuned") for bias in ("0.2", "1")}
        assert output.read_bytes().startswith(b"".join(lines[:3]))
        assert again[:4] == first
        with pytest.raises(RemoeError, match="other models, text or policy"):
            measure_frontier(plan(30, [0.2]), output)
        assert len(measure_frontier(plan(30, []), output, force=True, report=silent)) == 2
        with pytest.raises(RemoeError, match="choose from 2 to 8"):
            plan_frontier(
                place / "base.gguf", place / "router.gguf", {"prose": place / "prose.txt"}, slots=[1], length=30
            )
