"""The expert cache with all of its threads at once, under the sanitizers of the compiler."""

import os
import subprocess
from pathlib import Path

import pytest

from remoe_edge.runtime.pin import patches_dir

SOURCES = ("cache", "checksum", "forecast", "io", "policy")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(tmp_path: Path, sanitizer: str) -> None:
    root = patches_dir() / "sources"
    program = tmp_path / "stress"
    options = ("-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    sources = (
        root / "tests" / "test-expert-stress.cpp",
        *(root / "src" / f"llama-expert-{name}.cpp" for name in SOURCES),
    )
    built = subprocess.run(
        [os.environ.get("CXX", "c++"), *options, *sources, "-o", program], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    # A race ends the program with a report.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    result = subprocess.run(
        [program, "4"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("OK\n")
