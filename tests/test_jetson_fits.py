"""What is said to fit on which board: sizes against published files, limits, and the table in the documentation."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from remoe_edge.jetson.fits import BOARDS, MODELS, fit, markdown

# Gigabytes of published files in this quantisation.
PUBLISHED = {"OLMoE-1B-7B": 4.21, "DeepSeek-V2-Lite": 10.36, "gpt-oss-20b": 12.11, "Qwen3-30B-A3B": 18.56}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_sizes_are_those_of_published_files(model: object) -> None:
    assert model.bytes / 1e9 == pytest.approx(PUBLISHED[model.name], rel=0.04)  # type: ignore[attr-defined]


def test_limits() -> None:
    olmoe, board = MODELS[0], BOARDS[2]
    whole = fit(olmoe, board)
    assert (whole.slots, whole.read_bytes) == (olmoe.experts, (0, 0))
    # T_resident between a half and 28 % of the bandwidth, and no reads.
    used = 0.374e9 * 5.5 / 8 + 16 * 8 * olmoe.expert_bytes
    assert whole.tpot_ms == pytest.approx((1e3 * used / 51.2e9, 1e3 * used / (0.28 * 102.4e9)), rel=1e-6)

    small = replace(board, memory=4 << 30)
    part = fit(olmoe, small)
    assert 8 <= part.slots < olmoe.experts
    assert part.hit_rate
    assert part.read_bytes
    assert part.tpot_ms
    assert 0 < part.hit_rate[0] <= part.hit_rate[1] < 1
    assert part.read_bytes[0] == pytest.approx((1 - part.hit_rate[1]) * 16 * 8 * olmoe.expert_bytes)
    slow = fit(olmoe, small, storage=0.1e9)
    assert slow.tpot_ms
    assert slow.tpot_ms[0] == pytest.approx(part.read_bytes[0] / 0.1e9 * 1e3)
    assert fit(olmoe, replace(board, memory=1500 << 20)).slots == 0


def test_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "jetson.md").read_text()
    (table,) = re.findall(r"<!-- python -m remoe_edge\.jetson\.fits -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert table == markdown()
