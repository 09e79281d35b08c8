import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, find_browser, open_browser
from click.testing import CliRunner
from records import make_rows

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.measure.arms import Arm
from remoe_edge.measure.rows import Row
from remoe_edge.report.figures import figures
from remoe_edge.report.labels import row_label
from remoe_edge.report.markdown import markdown_report
from remoe_edge.report.page import html_report
from remoe_edge.report.summary import headline, lead, remarks

BASE, TUNED = Path("base.gguf"), Path("tuned.gguf")
MIB = 1 << 20


def rows(models: tuple[Path, ...] = (BASE,), repetitions: int = 6) -> list[Row]:
    rng = np.random.default_rng(1)
    tpots = {}
    for index, model in enumerate(models):
        faster = 0.8**index
        for arm, tpot in (
            (Arm("cache", model, str(64 * MIB)), 40.0 * faster),
            (Arm("cache", model, str(128 * MIB)), 30.0 * faster),
            (Arm("mmap", model), 300.0 * faster),
            (Arm("resident", model), 10.0),
        ):
            tpots[arm] = (tpot * rng.normal(1, 0.01, repetitions)).tolist()
    return make_rows(tpots)


def failed(row: Row, **fields: Any) -> Row:
    return {
        **row,
        "status": "killed",
        "reason": "too <b>big</b>",
        "tpot_ms": None,
        "samples": [],
        "outputs": [],
    } | fields


def with_power(row: Row) -> Row:
    power = {"t_ms": [0.0, 20.0, 40.0], "watts": [5.0, 9.0, 7.0], "tokens_ms": [5.0, 15.0, 25.0, 35.0, 40.0]}
    return {
        **row,
        "samples": [{**sample, "power": power} for sample in row["samples"]],
        "joules_per_token": 0.25,
        "power_sensor": "VDD_IN",
    }


def test_the_headline_says_what_is_faster_by_how_much() -> None:
    assert re.fullmatch(
        r"base with 128 MiB of expert cache: (29|30)\.\d ms per token, (9\.\d\d|10\.\d) times faster than stock mmap\.",
        headline(rows()),
    )
    text = lead(rows())
    assert re.search(r"Both without a memory limit; 95 % interval (9\.\d+|10\.\d)\u2013(9\.\d+|10\.\d)\.", text)
    assert re.search(r"(2\.9\d|3\.0\d) times slower than having all experts in memory \(95 % interval", text)
    assert "times what compute and storage bandwidth allow" in text


def test_a_ratio_whose_interval_holds_one_is_no_result() -> None:
    equal = {Arm("cache", BASE, str(MIB)): [10.0, 11.0, 10.5], Arm("mmap", BASE): [10.4, 10.5, 10.6]}
    assert "not clearly faster or slower than stock mmap" in headline(make_rows(equal))


def test_without_a_cached_arm_there_is_still_a_headline() -> None:
    assert headline(make_rows({Arm("mmap", BASE): [90.0]})) == "base, mmap: 90.0 ms per token."
    assert headline([failed(row) for row in rows()]) == "No arm could be measured."
    assert lead([failed(row) for row in rows()]) == ""


def test_remarks_tell_of_failures_few_repetitions_and_outputs() -> None:
    own = rows(repetitions=2)
    said = " ".join(remarks([failed(own[0]), *own[1:]]))
    assert "cache killed: too <b>big</b>." in said.replace("cache 64 MiB", "cache").replace("  ", " ")
    assert "With 2 repetitions, intervals say little" in said
    assert "All arms put out the same tokens." in said
    assert "there is no interval" in " ".join(remarks(rows(repetitions=1)))
    other = [{**row, "output_sha256": row["arm"]} for row in own]
    assert "did not all put out the same tokens" in " ".join(remarks(other))
    assert remarks(rows()) == ["All arms put out the same tokens."]


def test_a_second_model_is_compared_with_the_first() -> None:
    said = " ".join(remarks(rows((BASE, TUNED))))
    assert re.search(r"tuned is 1\.2\d times faster than the first model at 64 MiB and 1\.2\d times faster", said)


def test_labels_tell_rows_apart() -> None:
    for own in rows(), rows((BASE, TUNED)):
        labels = [row_label(row, own) for row in own]
        assert len(set(labels)) == len(labels)
    assert [row_label(row, rows()) for row in rows()] == ["cache 64 MiB", "cache 128 MiB", "mmap", "resident"]
    policies = make_rows({Arm("cache", BASE, str(MIB), policy): [1.0] for policy in ("lru", "lfu")})
    assert [row_label(row, policies) for row in policies] == ["cache lru 1 MiB", "cache lfu 1 MiB"]
    files = [row | {"file": name} for name in ("a", "b") for row in rows()[:1]]
    assert [row_label(row, files) for row in files] == ["a: cache 64 MiB", "b: cache 64 MiB"]


def test_a_page_has_the_figures_that_the_rows_have_data_for() -> None:
    names = ["distribution", "budget", "bytes", "layers"]
    assert [figure.name for figure in figures(rows())] == names
    assert [figure.name for figure in figures([with_power(row) for row in rows()])] == [*names, "power", "energy"]
    assert [figure.name for figure in figures(rows()[2:])] == ["distribution", "bytes"]
    assert figures([failed(row) for row in rows()]) == []


def test_a_page_is_complete_in_itself_and_its_text_is_text() -> None:
    own = [*rows((BASE, TUNED)), failed(rows()[0], model_path="<script>.gguf")]
    page = html_report(own, title="<title> & more")
    assert re.findall(r"(?:src|href)=\"(?!#|data:,)[^\"]*\"", page.replace("xlink:href", "href")) == []
    assert "http" not in re.sub(r"http://www\.w3\.org/(2000/svg|1999/xlink)", "", page)
    assert "url(http" not in page
    assert "&lt;title&gt; &amp; more" in page
    assert "<b>big" not in page
    assert "<script>.gguf" not in page
    # Colours are the page's, so that they follow light and dark.
    assert "#0a0b" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_equal_rows_give_an_equal_page() -> None:
    assert html_report(rows(), title="t") == html_report(rows(), title="t")


def test_markdown_is_a_table() -> None:
    text = markdown_report([*rows(), failed(rows()[0], reason="a | b\nc")], title="t")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| mmap |" in text


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in map(with_power, rows((BASE, TUNED)))))
    return path


@pytest.mark.parametrize(
    ("arguments", "name", "start"),
    [
        ([], "results.html", b"<!doctype html>"),
        (["-o", "r.png"], "r.png", b"\x89PNG\r\n"),
        (["--png"], "results.png", b"\x89PNG\r\n"),
        (["-o", "r.md", "--title", "Mine"], "r.md", b"# Mine"),
        (["-o", "r.txt", "--markdown"], "r.txt", b"# base and tuned on"),
    ],
)
def test_the_command_writes_what_the_name_says(
    results: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str, start: bytes
) -> None:
    monkeypatch.chdir(results.parent)
    done = CliRunner().invoke(cli, ["report", "results.jsonl", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{name}\n"
    assert (results.parent / name).read_bytes().startswith(start)
    again = CliRunner().invoke(cli, ["report", "results.jsonl", *arguments])
    assert isinstance(again.exception, RemoeError)
    assert "pass --force" in str(again.exception)


def test_the_command_refuses_what_cannot_be_right(results: Path) -> None:
    unknown = CliRunner().invoke(cli, ["report", str(results), "-o", "r.txt"])
    assert unknown.exit_code == 2
    assert "does not say what to write" in unknown.stderr
    own = CliRunner().invoke(cli, ["report", str(results), "-o", str(results), "--html", "--force"])
    assert isinstance(own.exception, RemoeError)
    assert "is one of the results" in str(own.exception)


@pytest.fixture(scope="module")
def browser() -> Any:
    executable = find_browser()
    if executable is None:
        # .ci/run installs one, so that there these tests run.
        assert not os.environ.get("CI"), "no Chromium found; apt install chromium"
        pytest.skip("no Chromium is installed")
    with open_browser(executable) as page:
        yield page


def first_column(page: Page) -> list[str]:
    cells = page.evaluate("[...document.querySelectorAll('tbody th')].map((cell) => cell.textContent)")
    return list(cells)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(results: Path, browser: Page, width: int, dark: bool) -> None:
    output = results.with_suffix(".html")
    assert CliRunner().invoke(cli, ["report", str(results)]).exit_code == 0
    browser.messages.clear()
    browser.requests.clear()
    browser.show(output, width=width, dark=dark)
    # Nothing sticks out at the side.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) is dark
    heights = browser.evaluate("[...document.querySelectorAll('section svg')].map((svg) => svg.clientHeight)")
    assert sum(height > 0 for height in heights) == len(heights) / 2 == 6
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].filter((text) => text.ownerSVGElement.clientHeight)"
        ".map((text) => [getComputedStyle(text).fontSize, text.getScreenCTM()])"
        ".map(([size, matrix]) => parseFloat(size) * Math.hypot(matrix.a, matrix.b)))"
    )
    assert smallest >= 9.5
    before = first_column(browser)
    browser.evaluate("document.querySelectorAll('thead button')[1].click()")
    assert browser.evaluate("document.querySelectorAll('thead th')[1].ariaSort") == "ascending"
    values = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')].map((row) => Number(row.cells[1].dataset.value))"
    )
    assert values == sorted(values)
    assert first_column(browser) != before
    browser.evaluate("document.querySelectorAll('thead button')[1].click()")
    assert browser.evaluate("Number(document.querySelector('tbody tr').cells[1].dataset.value)") == max(values)
    assert browser.messages == []
    assert browser.requests == [output.absolute().as_uri()]


def biased_rows() -> list[Row]:
    exact = Arm("cache", BASE, str(MIB))
    lossy = Arm("cache", BASE, str(MIB), route_bias=0.3)
    tpots = {exact: [30.0, 30.1, 30.2], lossy: [10.0, 10.1, 10.2], replace(lossy, route_keep=2): [15.0, 15.1, 15.2]}
    own = make_rows(tpots)
    return [own[0], *(row | {"output_sha256": "other"} for row in own[1:])]


def test_a_lossy_arm_is_named_and_is_no_headline_beside_exact_ones() -> None:
    own = biased_rows()
    labels = [row_label(row, own) for row in own]
    assert labels == ["cache 1 MiB", "cache route bias 0.3 1 MiB", "cache route bias 0.3 keep 2 1 MiB"]
    assert headline(own).startswith("base with 1 MiB of expert cache: 30.1 ms per token")
    assert headline(own[1:]).startswith("base with 1 MiB of expert cache and a route bias of 0.3 (lossy): 10.1 ms")
    said = " ".join(remarks(own))
    assert "Lossy, with other experts than the model's and another output: cache route bias 0.3 1 MiB and" in said
    assert "did not all put out the same tokens" not in said
    assert "lossy: experts in the cache are preferred (bias 0.3, the router's first 2 stay)" in markdown_report(
        own, title="x"
    )
