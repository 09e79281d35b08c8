"""pip of the running interpreter, as a subprocess: it has no API."""

import importlib.util
import subprocess
import sys

from remoe_edge.errors import RemoeError


def run_pip(*arguments: str) -> None:
    """Run ``pip`` quietly. Raises RemoeError with what it said if it fails, or if this environment has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise RemoeError(f"{sys.prefix} has no pip; add it with: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        raise RemoeError(f"pip {arguments[0]} failed: {result.stderr.strip()}")
