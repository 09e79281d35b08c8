"""Every interleaving of the expert cache's threads, and that a broken rule of its state machine is found."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from remoe_edge.runtime.pin import patches_dir

HERE = Path(__file__).parent
SOURCES = patches_dir() / "sources" / "src"
LIBRARY = SOURCES / "llama-expert-cache.cpp"

MUTATIONS = {
    "a read that is done wakes nobody": (
        "        if (in_op || g.n_loading == 0 || g.n_ahead == 0 || (r.load && loads.empty())) {\n",
        "        if (false) {\n",
        "nobody can go on",
    ),
    "a failed op wakes nobody": (
        "                op_failed.store(true);\n",
        "",
        "nobody can go on",
    ),
    "new reads wake no reader": (
        "        plan_resident(lock, ig);\n    }\n    cv_work.notify_all();\n",
        "        plan_resident(lock, ig);\n    }\n",
        "nobody can go on",
    ),
    "a slice is used while it is read": (
        "            if (s.state == SLICE_READY) {\n                op_order",
        "            if (s.state == SLICE_READY || s.state == SLICE_LOADING) {\n                op_order",
        "holds",
    ),
    "a failed read is ready": (
        "            s.state = SLICE_FAILED;\n",
        "            s.state = SLICE_READY;\n",
        "holds",
    ),
    "an expert of the call loses its slot": (
        "if (g.slot[expert] == -1 && !g.ahead[slot]",
        "if (!g.ahead[slot]",
        "",
    ),
    "a slot is refilled when the first thread has left it": (
        "++s.n_left == op_threads",
        "++s.n_left == 1",
        "in_use.count(dst) == 0",
    ),
    "slots of a failed call are kept": (
        "            g.dirty = true;\n            error ",
        "            error ",
        "",
    ),
    "the next call does not wait for reads under way": (
        "    cv_ready.wait(lock, [&] { return g.n_loading == 0 && (g.n_ahead == 0 || (!g.dirty && !streamed)); });\n",
        "",
        "",
    ),
}


def explore(library: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "interleavings"
    others = [SOURCES / f"llama-expert-{name}.cpp" for name in ("checksum", "forecast", "policy")]
    options = ("-std=c++17", "-O1", "-pthread", "-I", SOURCES, f'-DLIBRARY="{library}"')
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *options, HERE / "cache_interleavings.cpp", *others, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)


def test_no_interleaving_breaks_a_rule(tmp_path: Path) -> None:
    result = explore(LIBRARY, tmp_path)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    states = [int(count) for count in re.findall(r"(\d+) states", result.stdout)]
    assert len(states) == 7
    assert min(states) > 1000


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_broken_rule_is_found(tmp_path: Path, rule: str) -> None:
    old, new, message = MUTATIONS[rule]
    text = LIBRARY.read_text()
    assert text.count(old) == 1
    mutant = tmp_path / LIBRARY.name
    mutant.write_text(text.replace(old, new))
    result = explore(mutant, tmp_path)
    assert result.returncode != 0
    assert message in result.stdout
    assert "VIOLATION" in result.stdout or "Assertion" in result.stderr
