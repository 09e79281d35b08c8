import difflib
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.runtime.patch import apply_patches, fit_patches, parse_patch
from remoe_edge.runtime.pin import patches_digest

OLD = "".join(f"line {n}\n" for n in range(1, 41))
NEW = OLD.replace("line 5\n", "line five\n").replace("line 30\n", "line 30\nline 30 and a half\n")


def diff(name: str, old: str, new: str, context: int = 3) -> str:
    """A unified diff as git writes it."""
    result = ""
    before, after = (io.StringIO(text, newline="\n").readlines() for text in (old, new))
    lines = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", n=context)
    for line in lines:
        result += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    return result


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "a.cpp").write_text(OLD)
    (tree / "src" / "b.cpp").write_text(OLD)
    return tree


def make_patches(folder: Path, *patches: str, sources: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    for number, patch in enumerate(patches, 1):
        (folder / f"{number:04}.patch").write_bytes(patch.encode())
    (folder / "series").write_text("# in order\n\n" + "".join(f"{n:04}.patch\n" for n in range(1, len(patches) + 1)))
    for name, content in (sources or {}).items():
        path = folder / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def snapshot(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_sources_and_patches(tmp_path: Path, tree: Path) -> None:
    (tree / "src" / "a.cpp").chmod(0o755)
    head = "From: someone\nSubject: why\n\nBecause.\n---\n src/a.cpp | 4 ++--\n\n"
    mail = f"{head}{diff('src/a.cpp', OLD, NEW)}-- \n2.39.5\n"
    patches = make_patches(tmp_path / "patches", mail, sources={"include/new/own.h": "#pragma once\n"})
    changed = apply_patches(patches, tree)
    assert changed == [Path("include/new/own.h"), Path("src/a.cpp")]
    assert (tree / "src" / "a.cpp").read_text() == NEW
    assert (tree / "src" / "a.cpp").stat().st_mode & 0o777 == 0o755
    assert (tree / "include" / "new" / "own.h").read_text() == "#pragma once\n"
    after = snapshot(tree)
    assert apply_patches(patches, tree) == []
    assert snapshot(tree) == after


def test_empty_series(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "patches").mkdir()
    before = snapshot(tree)
    assert apply_patches(tmp_path / "patches", tree) == []
    assert snapshot(tree) == before


def test_series_on_one_file_is_completed(tmp_path: Path, tree: Path) -> None:
    newer = NEW.replace("line five\n", "line V\n")
    first, second = diff("src/a.cpp", OLD, NEW), diff("src/a.cpp", NEW, newer)
    apply_patches(make_patches(tmp_path / "one", first), tree)
    both = make_patches(tmp_path / "both", first, second)
    assert apply_patches(both, tree) == [Path("src/a.cpp")]
    assert (tree / "src" / "a.cpp").read_text() == newer
    assert apply_patches(both, tree) == []


def test_moved_lines_are_found(tmp_path: Path, tree: Path) -> None:
    prefix = "".join(f"new {n}\n" for n in range(50))
    (tree / "src" / "a.cpp").write_text(prefix + OLD)
    apply_patches(make_patches(tmp_path / "patches", diff("src/a.cpp", OLD, NEW)), tree)
    assert (tree / "src" / "a.cpp").read_text() == prefix + NEW


def test_nearest_of_equal_places_is_taken(tmp_path: Path, tree: Path) -> None:
    old = "{\n    x();\n}\n" * 20
    new = old[: len(old) // 2] + "{\n    y();\n}\n" + old[len(old) // 2 :].removeprefix("{\n    x();\n}\n")
    (tree / "src" / "a.cpp").write_text(old)
    apply_patches(make_patches(tmp_path / "patches", diff("src/a.cpp", old, new, context=1)), tree)
    assert (tree / "src" / "a.cpp").read_text() == new


def test_misfit_names_file_and_hunk_and_changes_nothing(tmp_path: Path, tree: Path) -> None:
    (tree / "src" / "b.cpp").write_text(OLD.replace("line 31\n", "other\n"))
    patches = make_patches(
        tmp_path / "patches", diff("src/a.cpp", OLD, NEW) + diff("src/b.cpp", OLD, NEW), sources={"own.cpp": "\n"}
    )
    before = snapshot(tree)
    with pytest.raises(RemoeError, match=r"hunk 2 of 2 \(@@ -28,6 \+28,7 @@\) of 0001\.patch does not fit src/b\.cpp"):
        apply_patches(patches, tree)
    assert snapshot(tree) == before


def test_missing_file(tmp_path: Path, tree: Path) -> None:
    patches = make_patches(tmp_path / "patches", diff("src/c.cpp", OLD, NEW))
    with pytest.raises(RemoeError, match=r"0001\.patch changes src/c\.cpp, which is missing"):
        apply_patches(patches, tree)


def test_different_source_file_is_refused(tmp_path: Path, tree: Path) -> None:
    patches = make_patches(tmp_path / "patches", diff("src/b.cpp", OLD, NEW), sources={"src/a.cpp": "mine\n"})
    before = snapshot(tree)
    with pytest.raises(RemoeError, match="unpatched"):
        apply_patches(patches, tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("only words\n", "no changes"),
        ("--- /dev/null\n+++ b/new.cpp\n@@ -0,0 +1 @@\n+x\n", "only changes to a file"),
        ("--- a/x.cpp\n+++ b/y.cpp\n@@ -1 +1 @@\n-x\n+y\n", "only changes to a file"),
        ("--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-x\n+y\n", "only changes to a file"),
        ("--- a/x\n+++ b/x\n@@ -1,9 +1 @@\n-x\n+y\n", "line 3: the hunk does not have the lines"),
        ("--- a/x\n+++ b/x\n@@ nonsense @@\n-x\n+y\n", "line 3: malformed hunk header"),
    ],
)
def test_malformed_patch(tmp_path: Path, patch: str, reason: str) -> None:
    path = tmp_path / "bad.patch"
    path.write_text(patch)
    with pytest.raises(RemoeError, match=reason):
        parse_patch(path)


TEXTS = st.lists(st.sampled_from(["", "a", "b", "-- a/x", "++ b/x", "\\ x", "@@", "\tc\r"]), max_size=12).flatmap(
    lambda lines: st.sampled_from(["\n".join(lines), "".join(f"{line}\n" for line in lines)])
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.integers(min_value=0, max_value=3))
def test_every_diff_applies(old: str, new: str, context: int) -> None:
    if old == new:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patches = make_patches(folder / "patches", diff("x", old, new, context))
        (folder / "x").write_bytes(old.encode())
        assert apply_patches(patches, folder) == [Path("x")]
        assert (folder / "x").read_bytes() == new.encode()


def test_digest_covers_everything_that_is_applied(tmp_path: Path) -> None:
    patches = make_patches(tmp_path / "patches", "one", "two", sources={"a": "x", "b": "y"})
    digests = {patches_digest(patches)}
    (patches / "README").write_text("no part of it")
    assert patches_digest(patches) in digests
    for name in ("0002.patch", "sources/b", "sources/c", "series"):
        with (patches / name).open("a") as file:
            file.write("\n0001.patch\n" if name == "series" else "more")
        digests.add(patches_digest(patches))
    assert len(digests) == 5


def test_hunks_that_fit_another_release_are_told_from_those_that_do_not(tmp_path: Path, tree: Path) -> None:
    patches = make_patches(
        tmp_path / "patches", diff("src/a.cpp", OLD, NEW), diff("src/c.cpp", OLD, NEW), sources={"src/b.cpp": "mine\n"}
    )
    fits, collisions = fit_patches(patches, tree)
    assert [fit.moved for fit in fits] == [0, 0, None, None]
    assert [(fit.patch, fit.file, fit.number) for fit in fits][2] == ("0002.patch", "src/c.cpp", 1)
    assert collisions == [Path("src/b.cpp")]
    # Two new lines on top, and the place of the second hunk rewritten.
    (tree / "src" / "a.cpp").write_text("new\nnew\n" + OLD.replace("line 31\n", "other\n"))
    before = snapshot(tree)
    assert [fit.moved for fit in fit_patches(patches, tree)[0]][:2] == [2, None]
    assert snapshot(tree) == before
