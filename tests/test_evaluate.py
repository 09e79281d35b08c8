"""Comparing routers: misses as the simulator counts them, statistics against known answers, verdicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from remoe_edge.evaluate.compare import compare, mcnemar, over_seeds, routing_figures, slots_for
from remoe_edge.evaluate.harness import pair, right_answers
from remoe_edge.evaluate.lru import cold_misses
from remoe_edge.evaluate.passes import Pass
from remoe_edge.evaluate.report import draw, markdown
from remoe_edge.evaluate.verdict import judge
from remoe_edge.routing.policies import Layer
from remoe_edge.routing.simulate import simulate_layer


def random_ids(rng: np.random.Generator, rows: int, tokens: int, layers: int, k: int, experts: int) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(experts), (rows, tokens, layers, 1)), axis=3)[..., :k].astype(np.int16)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 4), experts=st.integers(5, 9), tokens=st.integers(1, 40))
def test_misses_side_by_side_are_the_simulators(seed: int, k: int, experts: int, tokens: int) -> None:
    ids = random_ids(np.random.default_rng(seed), 2, tokens, 2, k, experts)
    slots = [k, min(experts, k + 2), experts]
    found = cold_misses(ids, experts, slots)
    for index, size in enumerate(slots):
        for row in range(2):
            for layer in range(2):
                events = [tuple(event) for event in ids[row, :, layer].tolist()]
                expected = simulate_layer(Layer(experts, k, size, events), "lru").misses
                assert found[index, row, layer] == expected


def test_figures_of_a_known_routing() -> None:
    # Two experts used in turn, one for ever: layer 0 reuses nothing, layer 1 everything.
    ids = np.zeros((1, 8, 2, 1), np.int16)
    ids[0, 1::2, 0] = 1
    found = routing_figures(ids, 4)
    assert found.reuse.tolist() == [[0.0, 1.0]]
    assert found.distinct.tolist() == [2, 1]
    assert found.load_cv[1] == pytest.approx(np.sqrt(3))
    assert found.load_entropy.tolist() == pytest.approx([0.5, 0.0])
    assert found.misses[1].tolist() == [[8, 1]]
    assert found.misses[2].tolist() == [[2, 1]]


def passes(rng: np.random.Generator, cost: float) -> tuple[Pass, Pass]:
    ids = random_ids(rng, 12, 30, 2, 2, 16)
    tuned = ids.copy()
    tuned[:, 1::2] = tuned[:, :-1:2]
    nll = rng.normal(2, 0.1, (12, 30)).astype(np.float32)
    none = np.full(2, 0.9, np.float32)
    worse = nll + np.float32(np.log(1 + cost))
    return Pass(nll, ids, none), Pass(worse, tuned, none, np.full((12, 30), 0.01, np.float32))


def test_compare_finds_what_was_put_in() -> None:
    base, tuned = passes(np.random.default_rng(0), 0.005)
    row = compare(base, tuned, 16, inside=20)
    assert row["ppl_change"] == pytest.approx(0.005, abs=1e-5)
    assert row["ppl_delta_ci95"] == pytest.approx([0.005, 0.005], abs=1e-5)
    assert row["ppl_tuned_beyond"] / row["ppl_base_beyond"] == pytest.approx(1.005, abs=1e-5)
    assert row["reuse_rate_tuned"] > 0.5 > row["reuse_rate_base"]
    low, high = row["reuse_rate_change_ci95"]
    assert low < row["reuse_rate_change"] < high
    assert row["lru_miss_change"]["C=K"] < -0.4
    # With C = K the hits are the reuse: the first token of each sequence misses.
    hits = row["lru_hit_rate_base"]["C=K"]
    assert hits == pytest.approx(row["reuse_rate_base"] * 29 / 30)
    assert row["kl_mean"] == pytest.approx(0.01)


def test_no_difference_is_found_where_there_is_none() -> None:
    base, _ = passes(np.random.default_rng(1), 0)
    row = compare(base, Pass(base.nll, base.ids, base.entropy, base.nll * 0), 16)
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


def test_seeds_give_a_t_interval() -> None:
    found = over_seeds([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], "x")
    assert found["mean"] == 2
    assert found["ci95"] == pytest.approx([2 - 4.303 / np.sqrt(3), 2 + 4.303 / np.sqrt(3)])
    assert over_seeds([{"x": 1.0}], "x")["ci95"] is None


def row(reuse: float, ppl: float, miss: float) -> dict:
    return {"reuse_rate_change": reuse, "ppl_change": ppl, "lru_miss_change": {"C=K": miss}}


def test_verdicts_say_reached_and_not_reached() -> None:
    good = judge([row(0.3, 0.008, -0.1)] * 3, [row(-0.02, -0.01, 0.01)])
    assert [verdict.reached for verdict in good] == [True, True, True, True]
    bad = judge([row(0.2, -0.02, -0.06)], [row(0.02, 0, 0)])
    assert [verdict.reached for verdict in bad] == [False, False, False, False]
    assert "NOT reached" in str(bad[0])
    assert judge([row(0.3, 0, -0.1)])[3].reached is None


def test_answers_of_the_harness_are_paired_by_item() -> None:
    def samples(right: list[int]) -> dict:
        items = [{"doc_id": i, "exact_match": float(i in right)} for i in range(4)]
        # A second, looser filter comes later and does not count.
        return {"gsm8k": [*items, *({"doc_id": i, "exact_match": 1.0} for i in range(4))]}

    rows = pair({"base": right_answers(samples([0, 1])), "tuned": right_answers(samples([1, 2, 3]))})
    assert [(r["task"], r["items"], r["base_only"], r["tuned_only"]) for r in rows] == [("gsm8k", 4, 1, 2)]
    with pytest.raises(Exception, match="no exact_match"):
        right_answers({"odd": [{"doc_id": 0, "bleu": 1.0}]})


def test_report_shows_every_router_and_says_what_is_missing(tmp_path) -> None:
    base, tuned = passes(np.random.default_rng(0), 0.02)
    figures = compare(base, tuned, 16)
    longer = compare(base, tuned, 16, inside=20)
    rows = [
        {"router": "seed0", "text": "wiki", "multiple": 1, "phase": "reading", **figures},
        {"router": "seed0", "text": "wiki", "multiple": 2, "phase": "reading", **longer},
        {"router": "seed0", "text": "wiki", "multiple": 1, "phase": "writing", **figures},
        {"router": "seed0", "text": "all", "multiple": 1, "phase": "reading", **figures},
    ]
    result = {
        "model_type": "olmoe",
        "layers": 2,
        "experts": 16,
        "top_k": 2,
        "length": 20,
        "chance_reuse_rate": 0.125,
        "texts": {"wiki": "wiki.txt"},
        "rows": rows,
        "verdicts": [{"text": str(verdict)} for verdict in judge([figures])],
    }
    text = markdown(result, "A title")
    assert "perplexity within 1 %: +2.00%: NOT reached" in text
    assert text.count("| seed0 |") == 5
    draw(result, tmp_path / "plot.png", "A title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
