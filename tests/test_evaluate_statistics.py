"""Comparing routers: figures and statistics against known answers, verdicts, the report."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.compare import compare, over_seeds
from remoe_edge.evaluate.evaluation import TUNED, evaluate
from remoe_edge.evaluate.figures import figures, join, slots_for
from remoe_edge.evaluate.mcnemar import mcnemar
from remoe_edge.evaluate.pictures import draw_ablation, draw_evaluation
from remoe_edge.evaluate.reader import Noise, Pass, moved, noise
from remoe_edge.evaluate.report import markdown
from remoe_edge.evaluate.verdict import judge
from remoe_edge.routing.trace import Trace, reuse_rate

EXPERTS = 16


def random_ids(rng: np.random.Generator, rows: int, tokens: int, layers: int, k: int, experts: int) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(experts), (rows, tokens, layers, 1)), axis=3)[..., :k].astype(np.uint16)


def passes(rng: np.random.Generator, cost: float, rows: int = 12) -> tuple[Pass, Pass]:
    """A base, and a router that repeats every other choice and raises perplexity by `cost`."""
    ids = random_ids(rng, rows, 30, 2, 2, EXPERTS)
    tuned = ids.copy()
    tuned[:, 1::2] = tuned[:, :-1:2]
    nll = rng.normal(2, 0.1, (rows, 30)).astype(np.float32)
    entropy = np.full(2, 0.9, np.float32)
    worse = nll + np.float32(np.log1p(cost))
    return Pass(ids, nll, None, entropy), Pass(tuned, worse, np.full((rows, 30), 0.01, np.float32), entropy)


def test_figures_of_a_known_routing() -> None:
    # Two experts used in turn, one for ever: layer 0 reuses nothing, layer 1 everything.
    ids = np.zeros((2, 8, 2, 1), np.uint16)
    ids[:, 1::2, 0] = 1
    found = figures(Pass(ids), 8)
    assert found.reuse.tolist() == [[0.0, 1.0]] * 2
    assert found.reuse_steps.tolist() == [[0.5] * 7] * 2
    assert found.distinct.tolist() == [2, 1]
    assert found.load_cv[1] == pytest.approx(np.sqrt(7))
    # By chance two tokens of layer 0 agree every other time.
    assert found.load_reuse.tolist() == pytest.approx([0.5, 1.0])
    assert found.load_entropy.tolist() == pytest.approx([1 / 3, 0.0])
    # One slot: layer 0 misses always, layer 1 once; two: each expert once. Carried, the second sequence misses nothing
    # but what one slot cannot hold.
    assert found.misses["cold"] == {"C=K": pytest.approx([9, 9])} | {
        "1/8": pytest.approx([9, 9]),
        "1/4": pytest.approx([3, 3]),
        "3/8": pytest.approx([3, 3]),
        "1/2": pytest.approx([3, 3]),
    }
    assert found.misses["carried"]["C=K"].tolist() == [9, 8]
    assert found.misses["carried"]["1/4"].tolist() == [3, 0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 4), rows=st.integers(1, 3), tokens=st.integers(2, 20))
def test_reuse_and_the_lemma(seed: int, k: int, rows: int, tokens: int) -> None:
    ids = random_ids(np.random.default_rng(seed), rows, tokens, 3, k, 9)
    found = figures(Pass(ids), 9)
    trace = Trace(ids.reshape(-1, 3, k), np.arange(rows + 1) * tokens, {"experts": 9})
    assert found.reuse.mean() == pytest.approx(reuse_rate(trace).total)
    assert found.reuse_steps.mean() == pytest.approx(found.reuse.mean())
    # A cold cache of K slots hits exactly what is reused, a larger one no less.
    reused = found.reuse.mean(1) * (tokens - 1) * 3 * k
    assert found.uses - found.misses["cold"]["C=K"] == pytest.approx(reused)
    for misses in found.misses["cold"].values():
        assert (found.uses - misses >= reused - 1e-6).all()


def test_joined_texts_are_one_text() -> None:
    base, tuned = passes(np.random.default_rng(0), 0.01)
    parts = [Pass(p.ids[half], p.nll[half], p.kl, p.entropy) for p in (base,) for half in (slice(0, 4), slice(4, 12))]
    whole, both = figures(base, EXPERTS), join([figures(part, EXPERTS) for part in parts])
    assert both.reuse == pytest.approx(whole.reuse)
    assert (both.counts == whole.counts).all()
    assert both.misses["cold"]["1/4"] == pytest.approx(whole.misses["cold"]["1/4"])
    assert both.kl is None
    row = compare(both, figures(tuned, EXPERTS), strata=[4, 8])
    assert row["ppl_change"] == pytest.approx(0.01, abs=1e-5)
    assert row["sequences"] == 12
    assert row["tokens"] == 360


def test_compare_finds_what_was_put_in() -> None:
    base, tuned = (figures(one, EXPERTS) for one in passes(np.random.default_rng(0), 0.005))
    row = compare(base, tuned, inside=20, text_bytes=1000)
    assert row["ppl_change"] == pytest.approx(0.005, abs=1e-5)
    assert row["ppl_delta_ci95"] == pytest.approx([0.005, 0.005], abs=1e-5)
    assert row["beyond"]["ppl_change"] == pytest.approx(0.005, abs=1e-5)
    assert row["bits_per_byte_base"] == pytest.approx(base.nll.sum() / np.log(2) / 1000)
    assert row["reuse_rate_tuned"] > 0.5 > row["reuse_rate_base"]
    for key in "reuse_rate_change", "lru_miss_change":
        change, interval = row[key], row[f"{key}_ci95"]
        if isinstance(change, dict):
            change, interval = change["C=K"], interval["C=K"]
        assert interval[0] < change < interval[1]
    assert row["lru_miss_change"]["C=K"] < -0.4
    assert row["lru_hit_rate_base"]["C=K"] == pytest.approx(row["reuse_rate_base"] * 29 / 30)
    assert row["kl_mean"] == pytest.approx(0.01)
    assert row["layers_tuned"]["reuse_rate"] == pytest.approx(tuned.reuse.mean(0))


def test_the_bootstrap_covers() -> None:
    # Of sequences whose true change of log perplexity is 0, about 95 % of the intervals hold it.
    rng = np.random.default_rng(5)
    ids = random_ids(rng, 24, 4, 1, 1, EXPERTS)
    held = 0
    for _ in range(60):
        base = rng.normal(2, 0.5, (24, 4)).astype(np.float32)
        tuned = base + rng.normal(0, 0.1, (24, 1)).astype(np.float32)
        one, other = (figures(Pass(ids, nll), EXPERTS) for nll in (base, tuned))
        low, high = compare(one, other)["ppl_delta_ci95"]
        held += low <= 0 <= high
    assert 50 <= held < 60


def test_no_difference_is_found_where_there_is_none() -> None:
    base, _ = passes(np.random.default_rng(1), 0)
    one = figures(base, EXPERTS)
    row = compare(one, one)
    assert row["reuse_rate_change"] == 0
    assert row["ppl_delta_ci95"] == [0, 0]
    assert set(row["lru_miss_change"].values()) == {0}


def test_slots_hold_at_least_one_token() -> None:
    assert slots_for(32, 4) == {"C=K": 4, "1/8": 4, "1/4": 8, "3/8": 12, "1/2": 16}
    assert slots_for(8, 2) == {"C=K": 2, "1/8": 2, "1/4": 2, "3/8": 3, "1/2": 4}


def test_mcnemar_against_a_table() -> None:
    # 1 against 8 discordant pairs: two-sided exact p = 2 * (1 + 9) / 512.
    base = [True] * 1 + [False] * 8 + [True] * 5
    tuned = [False] * 1 + [True] * 8 + [True] * 5
    found = mcnemar(base, tuned)
    assert (found["base_only"], found["tuned_only"]) == (1, 8)
    assert found["p_value"] == pytest.approx(2 * 10 / 512)
    assert mcnemar([True], [True])["p_value"] == 1.0
    # More discordant items than a float has exponents.
    assert mcnemar([True, False] * 1000, [False, True] * 1000)["p_value"] == 1.0


def test_seeds_give_a_t_interval() -> None:
    found = over_seeds([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], "x")
    assert found["mean"] == 2
    assert found["ci95"] == pytest.approx([2 - 4.303 / np.sqrt(3), 2 + 4.303 / np.sqrt(3)])
    assert over_seeds([{"x": 1.0}], "x")["ci95"] is None


def test_noise_is_what_a_second_pass_differs_by() -> None:
    base, again = passes(np.random.default_rng(2), 0.001)
    found = noise("in another way", base, again)
    assert found.kl_mean == pytest.approx(0.01)
    assert found.ppl_change == pytest.approx(0.001, rel=1e-2)
    assert found.moved == moved(base.ids, again.ids) > 0.3
    assert moved(base.ids, base.ids[..., ::-1]) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 4))
def test_tokens_drawn_alone_reuse_what_their_load_says(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.log(rng.dirichlet(np.full(EXPERTS, 0.5)) + 1e-9)
    noise = rng.gumbel(size=(4, 2000, 2, EXPERTS))
    found = figures(Pass(np.argsort(-(logits + noise), -1)[..., :k].astype(np.uint16)), EXPERTS)
    assert found.reuse.mean(0) == pytest.approx(found.load_reuse, abs=0.02)


def row(reuse: float, ppl: float, miss: float, beyond: float = 0.0) -> dict:
    changes = {"reuse_rate_change": reuse, "ppl_change": ppl, "reuse_beyond_load_change": beyond}
    return {**changes, "lru_miss_change": {"C=K": miss}}


def test_verdicts_say_reached_and_not_reached() -> None:
    good = judge([row(0.3, 0.008, -0.1)] * 3, [row(-0.02, -0.01, 0.01)], [row(0.2, 0, -0.05)] * 3)
    assert [verdict.reached for verdict in good] == [True, True, True, True]
    assert "on own output +20.00%" in str(good[0])
    bad = judge([row(0.2, -0.02, -0.06)], [row(0.02, 0, 0)])
    assert [verdict.reached for verdict in bad] == [False, False, False, False]
    assert "NOT reached" in str(bad[0])
    assert judge([row(0.3, 0, -0.1)])[3].reached is None
    controls = [row(0.02, 0, 0, -0.001), row(0.03, 0, 0, -0.003), row(0.025, 0, 0, -0.002)]
    assert "NOT reached (more than chance; beyond its load -0.20 points)" in str(
        judge([row(0.3, 0, -0.1)], controls)[3]
    )
    controls[0] = row(-0.02, 0, 0)
    assert "its interval holds 0" in str(judge([row(0.3, 0, -0.1)], controls)[3])
    wide = judge([row(0.3, 0.009, -0.1), row(0.3, -0.009, -0.1)])
    assert "reached (its interval reaches beyond)" in str(wide[1])


class Written:
    """A reader of made-up passes: "tuned" reuses more at a known cost."""

    names = ["base", "seed0", "seed1", "ce"]  # noqa: RUF012
    kind, layers, experts, top_k = "olmoe", 2, EXPERTS, 2

    def sequences(self, path: Path, length: int, report) -> np.ndarray:
        tokens = len(path.read_text())
        if tokens < 2 * length:
            raise RemoeError(f"{path}: too short")
        return np.zeros((tokens // length, length + 1), np.int64)

    def text_bytes(self, rows: np.ndarray) -> int:
        return rows[:, 1:].size * 4

    def read(self, rows: np.ndarray, report) -> list[Pass]:
        report("reading", 0.5)
        n, length = len(rows), rows.shape[1] - 1
        rng = np.random.default_rng(length)
        found = []
        for repeats, cost in ((1, 0.0), (2, 0.004), (2, 0.006), (1, -0.01)):
            ids = random_ids(rng, n, length, 2, 2, EXPERTS)
            for step in range(1, repeats):
                ids[:, step::repeats] = ids[:, 0 : length - step : repeats]
            nll = np.full((n, length), 2 + np.log1p(cost), np.float32)
            found.append(Pass(ids, nll, np.full((n, length), cost**2, np.float32), np.full(2, 0.8, np.float32)))
        return found

    def write(self, prompts: np.ndarray, tokens: int, report) -> list[Pass]:
        return [Pass(one.ids) for one in self.read(np.zeros((len(prompts), tokens + 1)), report)]

    def noise(self, rows: np.ndarray, report) -> list[Noise]:
        return [Noise("in another way", 10, 1e-6, 1e-5, 1e-7, 0.0)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "wiki.txt").write_text("w" * 640)
    (folder / "code.txt").write_text("c" * 70)
    texts = {name: folder / f"{name}.txt" for name in ("wiki", "code")}
    shown: list[float] = []

    def report(text: str, part: float | None) -> None:
        shown.append(part or 0)

    groups = {TUNED: ["seed0", "seed1"], "ce-only": ["ce"]}
    found = evaluate(Written(), texts, groups=groups, length=32, sequences=8, own_tokens=16, report=report)
    assert shown == sorted(shown)
    assert 0.9 < shown[-1] <= 1
    return found


def test_evaluation_holds_what_other_tools_rely_on(result: dict) -> None:
    assert result["ppl_base"] == pytest.approx(np.exp(2))
    assert result["ppl_change"] == pytest.approx(0.005, abs=1e-5)
    low, high = result["ppl_delta_ci95"]
    assert low < 0.005 < high
    assert result["reuse_rate_tuned"] > 2 * result["reuse_rate_base"]
    assert set(result["lru_miss_change"]) == {"C=K", "1/8", "1/4", "3/8", "1/2"}
    rows = result["rows"]
    assert {(r["text"], r["multiple"], r["phase"]) for r in rows} >= {("wiki", 4, "reading"), ("code", 1, "writing")}
    # Too short for two sequences of twice the length: left out, not made up.
    assert not [r for r in rows if r["text"] == "code" and r["multiple"] > 1]
    beyond = next(r for r in rows if r["multiple"] == 2)
    assert beyond["beyond"]["ppl_change"] == pytest.approx(0.004, abs=1e-5)
    assert result["groups"][TUNED]["ppl_change"]["seeds"] == pytest.approx([0.004, 0.006], abs=1e-5)
    assert [v["reached"] for v in result["verdicts"][:3]] == [True, True, True]
    # Experts are drawn evenly: what is reused more has nothing to do with the load.
    beyond = result["groups"][TUNED]["reuse_beyond_load_change"]["mean"]
    total = next(r for r in rows if r["text"] == "all" and r["router"] == "seed0" and r["phase"] == "reading")
    assert beyond == pytest.approx(total["reuse_rate_tuned"] - total["reuse_rate_base"], abs=0.05)


def test_report_shows_every_router(result: dict, tmp_path: Path) -> None:
    result = {**result, "tasks": [{"task": "gsm8k", "router": "seed0", **mcnemar([True, False], [True, True])}]}
    text = markdown(result, "A title")
    assert "- perplexity within 1 %: +0.50%" in text
    assert "## Noise floor" in text
    assert "| gsm8k | seed0 | 2 | 50.0% | 100.0% | 0 | 1 | 1.000 |" in text
    for name in "seed0", "seed1", "ce":
        # By text, in total, own output with its total, beyond the length, collapse.
        assert text.count(f"| {name} |") >= 8
    draw_evaluation(result, tmp_path / "plot.png", "A title")
    draw_ablation(result, tmp_path / "ablation.png", "A title")
    for name in "plot.png", "ablation.png":
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
