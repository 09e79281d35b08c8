import json
from pathlib import Path

import pytest
from records import RUN, STOCK, record

from remoe_edge.errors import RemoeError
from remoe_edge.measure.journal import Journal, journal_path, open_journal, refuse_interrupted
from remoe_edge.measure.storage import Bandwidth

PLAN = {"arms": [1, 2], "number of tokens": 5}
FULL = record(
    RUN,
    storage=Bandwidth(1e9, 4096, 4, True),
    energy={"joules_per_token": 1.5},
    power={"t_ms": [0.5], "watts": [3.0], "tokens_ms": [1.0]},
    state={"before": {}, "after": {}, "temperature_c": [40.0, None]},
    notes=("a note",),
)
RECORDS = [FULL, record(STOCK, arm=1), record(None, arm=2)]


def written(path: Path) -> Path:
    with open_journal(path, PLAN, resume=False) as journal:
        for each in RECORDS:
            journal.append(each)
    return path


def read(path: Path) -> Journal:
    with open_journal(path, PLAN, resume=True) as journal:
        return journal


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    assert read(written(tmp_path / "j")).records == RECORDS


def test_records_are_on_disk_at_once(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j", PLAN, resume=False) as journal:
        journal.append(FULL)
        assert len((tmp_path / "j").read_bytes().splitlines()) == 2


def test_after_a_crash_at_any_byte_the_whole_lines_are_there(tmp_path: Path) -> None:
    content = written(tmp_path / "whole").read_bytes()
    for end in range(0, len(content) + 1, 97):
        path = tmp_path / "cut"
        path.write_bytes(content[:end])
        whole = content[:end].count(b"\n")
        with open_journal(path, PLAN, resume=True) as journal:
            assert journal.records == RECORDS[: max(0, whole - 1)]
            journal.append(FULL)
        assert read(path).records == [*RECORDS[: max(0, whole - 1)], FULL]


def test_another_plan_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    before = path.read_bytes()
    with (
        pytest.raises(RemoeError, match="was made with another number of tokens; give the same options"),
        open_journal(path, PLAN | {"number of tokens": 6}, resume=True),
    ):
        pass
    assert path.read_bytes() == before


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    for content in "hello\n", "[]\n", json.dumps({"plan": {}}) + "\n":
        (tmp_path / "j").write_text(content)
        with pytest.raises(RemoeError, match="is not a journal of this version"):
            read(tmp_path / "j")


def test_two_benchmarks_do_not_write_one_journal(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "j", PLAN, resume=False),
        pytest.raises(RemoeError, match="another benchmark is writing it"),
        open_journal(tmp_path / "j", PLAN, resume=True),
    ):
        pass


def test_interrupted_runs_are_not_thrown_away(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    refuse_interrupted(output, resume=False, force=False)
    with pytest.raises(RemoeError, match="nothing to go on with"):
        refuse_interrupted(output, resume=True, force=False)
    written(journal_path(output))
    with pytest.raises(RemoeError, match="pass --resume"):
        refuse_interrupted(output, resume=False, force=False)
    refuse_interrupted(output, resume=True, force=False)
    refuse_interrupted(output, resume=False, force=True)
    with open_journal(journal_path(output), PLAN, resume=False) as journal:
        assert journal.records == []
