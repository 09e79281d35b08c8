"""llama.cpp's own programs, as the runtime has them."""

import os
import subprocess
from pathlib import Path

from remoe_edge.runtime.build import ensure_runtime


def tool(name: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ensure_runtime().bin_dir / name), *map(str, args)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def completion(model: Path, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Six tokens of llama-completion, greedily.

    One run in twenty, patched or not, ends before its logging thread has written everything: it is repeated.
    """
    common = ("-m", model, "-p", "ab", "-n", 6, "--temp", 0, "-no-cnv", "--ignore-eos", "-c", 256, "-t", 1, "-v")
    for _ in range(5):
        result = tool("llama-completion", *common, *args, env=env)
        if result.stdout.endswith("\n") if result.returncode == 0 else "error: " in result.stdout + result.stderr:
            break
    return result
