import os
import re
import subprocess
import sys
from pathlib import Path

from remoe_edge import __version__, commands
from remoe_edge.runtime.pin import load_pin, patches_dir


def remoe_edge(*arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "remoe_edge", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


def test_version_names_all_parts() -> None:
    result = remoe_edge("--version")
    pin = load_pin(patches_dir())
    expected = f"remoe-edge {__version__} (llama-cpp-python {pin.version}, llama.cpp {pin.llama_cpp_commit}, patches "
    assert result.returncode == 0
    assert result.stdout.startswith(expected)
    assert re.search(r"patches [0-9a-f]{12}\)\n$", result.stdout)


def test_help_lists_every_command() -> None:
    result = remoe_edge("--help")
    assert result.returncode == 0, result.stderr
    modules = {path.stem for path in Path(next(iter(commands.__path__))).glob("[a-z]*.py")}
    assert set(re.findall(r"^  (\w+)  +\S", result.stdout.split("Commands:")[1], re.MULTILINE)) == modules


def test_wrong_usage() -> None:
    for arguments in (["no-such-command"], ["--no-such-option"], ["build", "--jobs", "0"]):
        result = remoe_edge(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "Error: " in result.stderr


def test_expected_failure_is_a_sentence(tmp_path: Path) -> None:
    result = remoe_edge("build", "--source", str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {tmp_path.resolve()} is not a llama.cpp checkout: it has no CMakeLists.txt\n"


def test_reader_that_went_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = remoe_edge("--help", stdout=writer)
    finally:
        os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""


def test_full_disk() -> None:
    with open("/dev/full", "w") as full:
        result = remoe_edge("--help", stdout=full.fileno())
    assert result.returncode == 1
    assert result.stderr == "Error: [Errno 28] No space left on device\n"
