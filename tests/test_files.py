import os
from pathlib import Path

import pytest

from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, cache_dir, same_file


def test_output_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_output(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def fail() -> None:
        with atomic_output(target, force=True) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_existing_output_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(RemoeError, match="--force"), atomic_output(target):
        pytest.fail("the body must not run")
    with atomic_output(target, force=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_output_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with atomic_output(target) as temporary:
            temporary.write_text("mine")
            target.write_text("theirs")

    with pytest.raises(RemoeError, match="exists"):
        race()
    assert target.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for target in (folder, pipe):
        with pytest.raises(RemoeError, match="not a regular file"), atomic_output(target, force=True):
            pytest.fail("the body must not run")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match="not a folder"), atomic_output(tmp_path / "no" / "out"):
        pytest.fail("the body must not run")


def test_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_output(link, force=True) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_longest_possible_name(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    with atomic_output(target) as temporary:
        temporary.write_text("whole")
    assert target.read_text() == "whole"


def test_same_file(tmp_path: Path) -> None:
    a, b, hard, soft = (tmp_path / name for name in ("a", "b", "hard", "soft"))
    a.touch()
    b.touch()
    os.link(a, hard)
    soft.symlink_to(a)
    assert same_file(a, hard)
    assert same_file(soft, a)
    assert same_file(a, tmp_path / "." / "a")
    assert not same_file(a, b)
    assert not same_file(a, tmp_path / "missing")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("REMOE_EDGE_CACHE", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "remoe-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "remoe-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "remoe-edge"
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
