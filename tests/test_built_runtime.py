"""The runtime that ``remoe-edge build`` installed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_edge.runtime.build import BuildOptions, Runtime, check_runtime, ensure_runtime
from remoe_edge.runtime.pin import load_pin, patches_dir

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return ensure_runtime()


def test_it_matches_the_sources() -> None:
    assert check_runtime(BuildOptions()) == []


def test_a_process_holds_one_copy_of_every_library() -> None:
    code = """
import json, llama_cpp, llama_cpp.mtmd_cpp, llama_cpp._ggml
llama_cpp.llama_backend_init()
lines = open("/proc/self/maps").read().splitlines()
print(json.dumps(sorted({line.split()[-1] for line in lines if "libggml" in line or "libllama" in line})))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = [Path(path) for path in json.loads(out)]
    names = [path.name for path in loaded]
    assert {"libggml.so", "libggml-base.so", "libggml-cpu.so", "libllama.so"} <= set(names)
    assert len(set(names)) == len(names)
    assert {path.parent.parent.name for path in loaded} == {"llama_cpp"}


@pytest.mark.parametrize(
    ("tool", "option"),
    [
        ("llama-bench", "--help"),
        ("llama-cli", "--version"),
        ("llama-completion", "--version"),
        ("llama-perplexity", "--version"),
        ("llama-quantize", "--help"),
        ("llama-server", "--version"),
    ],
)
def test_tools_start(runtime: Runtime, tool: str, option: str) -> None:
    result = subprocess.run([runtime.bin_dir / tool, option], capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if option == "--version":
        assert result.returncode == 0, output
        assert load_pin(patches_dir()).llama_cpp_commit in output
    else:
        assert "usage" in output


def test_cpp_unit_tests_pass(runtime: Runtime, tmp_path: Path) -> None:
    sources = patches_dir() / "sources" / "tests"
    names = sorted(path.stem for path in sources.glob("test-expert*.cpp"))
    assert sorted(path.name for path in runtime.bin_dir.glob("test-expert*")) == names
    # tests/test_policy_vectors.py runs test-expert-policy, with a file of recorded victims.
    for name in set(names) - {"test-expert-policy"}:
        # It makes its file where it is started, and leaves it there if it is killed.
        result = subprocess.run([runtime.bin_dir / name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
