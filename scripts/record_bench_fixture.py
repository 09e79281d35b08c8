"""Record tests/data/equal_and_delayed.jsonl: one model under three names, the third with a delay of 5 %.

    python scripts/record_bench_fixture.py MODEL PROMPT

The delay is real time: each evaluation is followed by a wait for a twentieth of what it took. All three run in one
benchmark, taking turns, because a machine's speed drifts by more than 5 % within minutes. Record on an idle machine.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "equal_and_delayed.jsonl"
DELAY = """
import time
from remoe_edge.runtime.llama import Session

decode = Session._decode_batch

def slow(self, tokens, all_logits):
    begin = time.monotonic_ns()
    decode(self, tokens, all_logits)
    until = begin + (time.monotonic_ns() - begin) * 1.05
    while self.path.name == "delayed.gguf" and time.monotonic_ns() < until:
        pass

Session._decode_batch = slow
"""


def main() -> None:
    model, prompt = Path(sys.argv[1]).absolute(), sys.argv[2]
    OUTPUT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(DELAY)
        models = ("first.gguf", "second.gguf", "delayed.gguf")
        for name in models:
            Path(folder, name).symlink_to(model)
        command = [
            *models,
            "--baseline",
            "resident",
            "--page-cache",
            "warm",
            "-p",
            prompt,
            "-n",
            "48",
            "-r",
            "24",
            "-t",
            "1",
        ]
        subprocess.run(
            [sys.executable, "-m", "remoe_edge", "bench", *command, "-o", OUTPUT, "--force"],
            check=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
        )


if __name__ == "__main__":
    main()
