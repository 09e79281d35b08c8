import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from records import make_rows

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.measure.arms import Arm
from remoe_edge.measure.compare import compare_benchmarks
from remoe_edge.measure.rows import Row, read_rows, run_ratio

MODEL = Path("m.gguf")
RECORDED = Path(__file__).parent / "data" / "equal_and_delayed.jsonl"
MARGIN = 0.04
"""Of the recorded rows: 24 runs of half a second each on a virtual machine that shares its cores."""


def recorded() -> dict[str, Row]:
    """One model under three names in one benchmark, the last with 5 % of delay; see scripts/record_bench_fixture.py."""
    return {row["model_path"]: row for row in read_rows(RECORDED)}


def test_the_same_arm_twice_is_equivalent() -> None:
    rows = recorded()
    (pair,) = compare_benchmarks([rows["first.gguf"]], [rows["second.gguf"]], margin=MARGIN).pairs
    assert pair.verdict == "equivalent"
    assert pair.same_output
    ratio = run_ratio(rows["second.gguf"], rows["first.gguf"])
    assert ratio is not None
    assert ratio.ci95 is not None
    assert 1 - MARGIN < ratio.ci95[0] < 1 < ratio.ci95[1] < 1 + MARGIN


def test_a_delay_of_5_percent_is_found() -> None:
    rows = recorded()
    ratio = run_ratio(rows["delayed.gguf"], rows["first.gguf"])
    assert ratio is not None
    assert ratio.ci95 is not None
    assert 1 < ratio.ci95[0] < 1.05 < ratio.ci95[1]
    for other in "first.gguf", "second.gguf":
        (pair,) = compare_benchmarks([rows[other]], [rows["delayed.gguf"]], margin=MARGIN).pairs
        assert pair.verdict == "slower"
        assert pair.tpot is not None
        assert pair.tpot.p_value < 0.01


def test_taking_times_costs_less_than_a_thousandth() -> None:
    assert all(0 < row["timer_overhead"] < 1e-3 for row in recorded().values())


def test_every_recorded_run_5_percent_slower_is_slower() -> None:
    rows = recorded()
    slower = scaled(rows["first.gguf"], 1.05)
    ratio = run_ratio(slower, rows["first.gguf"])
    assert ratio is not None
    assert ratio.ratio == pytest.approx(1.05)


def scaled(row: Row, factor: float) -> Row:
    samples = [{**sample, "itl_ns": [gap * factor for gap in sample["itl_ns"]]} for sample in row["samples"]]
    return {**row, "samples": samples, "tpot_ms": row["tpot_ms"] * factor}


def benchmark(factor: float = 1.0, **fields: Any) -> list[Row]:
    arms = {
        Arm("cache", MODEL, "1000"): [20.0, 20.2, 19.9, 20.1],
        Arm("cache", MODEL, "2000"): [15.0, 15.2, 14.9, 15.1],
        Arm("mmap", MODEL): [80.0, 101.0, 93.0, 88.0],
    }
    rows = make_rows({arm: [value * factor for value in values] for arm, values in arms.items()})
    return [{**row, **fields} for row in rows]


def test_what_got_slower_is_said() -> None:
    result = compare_benchmarks(benchmark(), benchmark(1.1))
    assert [pair.verdict for pair in result.pairs] == ["slower", "slower", "unclear"]
    assert result.pairs[0].tpot is not None
    assert result.pairs[0].tpot.ratio == pytest.approx(1.1, rel=1e-3)
    assert [pair.verdict for pair in compare_benchmarks(benchmark(), benchmark(0.7)).pairs] == ["faster"] * 3
    same = compare_benchmarks(benchmark(), benchmark())
    # The mmap arm's runs differ too much among themselves to tell.
    assert [pair.verdict for pair in same.pairs] == ["equivalent", "equivalent", "unclear"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("power_mode", "15W", "the power mode differs .*power_mode None and 15W"),
        ("jetson_clocks", True, "the power mode differs"),
        ("prompts_sha256", "z", "the prompts differs"),
        ("chat_template", True, "the prompts differs"),
        ("n_gen", 6, "the length of the output differs .*n_gen 5 and 6"),
    ],
)
def test_what_cannot_be_compared_is_refused(field: str, value: Any, message: str) -> None:
    other = benchmark(**{field: value})
    with pytest.raises(RemoeError, match=f"{message}.*--anyway"):
        compare_benchmarks(benchmark(), other)
    result = compare_benchmarks(benchmark(), other, anyway=True)
    assert result.pairs[0].verdict == "equivalent"
    assert result.pairs[0].conditions


def test_other_prompts_are_pooled_if_told_to() -> None:
    other = benchmark(1.1, prompts_sha256="z")
    for row in other:
        row["samples"] = [{**sample, "prompt": f"other {sample['prompt']}"} for sample in row["samples"]]
    pair = compare_benchmarks(benchmark(), other, anyway=True).pairs[0]
    assert pair.tpot is not None
    assert pair.tpot.runs == (8, 8)
    assert pair.verdict == "slower"


def test_changed_conditions_are_told() -> None:
    new = benchmark(patch_hash="b" * 64, storage_bytes_per_s=2e6, device="board")
    first, *_ = compare_benchmarks(benchmark(patch_hash="a" * 64), new).pairs
    assert "patches: aaaaaaaaaaaa, now bbbbbbbbbbbb" in first.conditions
    assert "storage: 1 MB/s, now 2 MB/s" in first.conditions
    assert any(condition.startswith("device: ") for condition in first.conditions)


def test_arms_are_matched_by_what_they_are() -> None:
    old, new = benchmark(), benchmark()
    result = compare_benchmarks(old[:2], new[1:])
    assert [(pair.old["budget"], pair.new["budget"]) for pair in result.pairs] == [("2000", "2000")]
    assert [row["budget"] for row in result.only_old] == ["1000"]
    assert [row["arm"] for row in result.only_new] == ["mmap"]
    # Before and after tuning, and after the default policy changed.
    renamed = [{**row, "model_path": "tuned.gguf", "policy": "lru" if row["policy"] else None} for row in new]
    result = compare_benchmarks(old, renamed)
    assert len(result.pairs) == 3
    assert "policy: lfu, now lru" in result.pairs[0].conditions
    with pytest.raises(RemoeError, match="no arm is in both"):
        compare_benchmarks(old[:1], new[1:])


def test_an_arm_that_failed_is_not_measured() -> None:
    failed = [{**row, "status": "killed", "reason": "why", "tpot_ms": None, "samples": []} for row in benchmark()]
    assert [pair.verdict for pair in compare_benchmarks(benchmark(), failed).pairs] == ["not measured"] * 3
    invalid = [{**row, "status": "invalid", "reason": "mode"} for row in benchmark()]
    assert [pair.verdict for pair in compare_benchmarks(invalid, benchmark()).pairs] == ["not measured"] * 3


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    old = written(tmp_path / "a.jsonl", benchmark())
    new = written(tmp_path / "b.jsonl", benchmark(1.4, device="board"))
    shown = CliRunner().invoke(cli, ["compare", old, new])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("slower") == 3
    assert "Changed: device" in shown.output
    content = json.loads(CliRunner().invoke(cli, ["compare", old, new, "--json"]).stdout)
    assert content["arms"][0]["verdict"] == "slower"
    assert content["arms"][0]["tpot"]["ratio"] == pytest.approx(1.4)


def test_few_repetitions_are_said_to_be_few(tmp_path: Path) -> None:
    rows = make_rows({Arm("mmap", MODEL): [90.0]})
    path = written(tmp_path / "a.jsonl", rows)
    shown = CliRunner().invoke(cli, ["compare", path, path])
    assert "too few runs" in shown.output
    assert "take at least -r 4" in shown.output


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ("", "holds no rows"),
        ("hello", "cannot be read as JSONL"),
        ('{"arm": "cache"}\n', r"row 1: has no field 'status'"),
        ("[1]", "row 1: has no field 'arm'"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(RemoeError, match=message):
            read_rows(tmp_path / "a.jsonl")


def test_an_arm_with_a_route_bias_is_another_arm() -> None:
    plain = make_rows({Arm("cache", MODEL, "1000"): [20.0, 20.2, 19.9]})
    biased = make_rows({Arm("cache", MODEL, "1000", route_bias=0.3): [10.0, 10.2, 9.9]})
    with pytest.raises(RemoeError, match="no arm is in both files"):
        compare_benchmarks(plain, biased)
    assert len(compare_benchmarks(biased, biased).pairs) == 1
    # Rows of before there was such a thing have none.
    older = [{key: value for key, value in row.items() if not key.startswith("route_")} for row in plain]
    assert len(compare_benchmarks(older, plain).pairs) == 1
