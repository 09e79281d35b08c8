"""A program: load every GGUF of a folder and decode a token, each in a process of its own, and say how each ended.

``python load_hostile.py FOLDER [--unchecked]`` prints a JSON object: file name to ``{"signal", "error"}``. ``error`` is
null where the model ran. ``--unchecked`` leaves out what remoe-edge checks before, to see what the runtime does alone.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import remoe_edge.runtime.llama as runtime
from remoe_edge.errors import RemoeError


def attempt(path: Path) -> str | None:
    try:
        with runtime.open_model(
            path, runtime.CacheConfig("2s"), n_ctx=64, n_batch=8, n_ubatch=8, n_threads=1
        ) as session:
            session.decode([5, 6, 7])
    except RemoeError as error:
        return str(error)
    return None


def in_child(path: Path) -> dict[str, object]:
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            # As the command line does it.
            os.dup2(answer.fileno(), 2)
            said = attempt(path)
            if said is not None:
                os.write(2, f"Error: {said}".encode(errors="replace"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        text = answer.read().decode(errors="replace").partition("Error: ")[2].strip()
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None, "error": text or None}


def main() -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    if "--unchecked" in sys.argv:
        runtime.check_runnable = lambda path: []
    # Loaded once, before the forks.
    runtime._llama()
    print(json.dumps({path.name: in_child(path) for path in sorted(Path(sys.argv[1]).iterdir())}))


if __name__ == "__main__":
    main()
