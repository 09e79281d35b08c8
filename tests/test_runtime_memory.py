"""The budget holds: a process needs what it says and no more, also under a limit that leaves nothing else."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.cgroup import CgroupUnavailableError, memory_group
from remoe_edge.measure.worker import Job, decode_in_process
from remoe_edge.routing.trace import packaged_trace
from remoe_edge.routing.twin import plan_twin, write_twin
from remoe_edge.runtime.llama import CacheConfig

pytestmark = pytest.mark.runtime

MIB = 1 << 20
N_GEN = 24


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 480 MB of experts."""
    path = tmp_path_factory.mktemp("twin") / "twin.gguf"
    write_twin(plan_twin(packaged_trace(), hidden=1024, ff=256), path)
    return path


@dataclass(frozen=True)
class Allowance:
    """Bytes, by what they are for."""

    budget: int
    dense: int
    buffers: int
    process: int

    @property
    def total(self) -> int:
        return self.budget + self.dense + self.buffers + self.process


def job(twin: Path, prompt_tokens: int, io: str) -> Job:
    prompt = "".join(f"w{step % 299:05d}" for step in range(prompt_tokens))
    return Job(str(twin), prompt, N_GEN, 2, CacheConfig("16s", io=io), mmap=True, repack=False)


def allowance(twin: Path, prompt_tokens: int) -> Allowance:
    """What the run may take, by the sizes that llama.cpp prints for buffers and the file's own for dense weights."""
    script = f"""
from pathlib import Path
from remoe_edge.measure.worker import process_memory
from remoe_edge.runtime.llama import CacheConfig, open_model, system_info
system_info()
print("process =", process_memory("self"))
with open_model(Path({str(twin)!r}), CacheConfig("16s"), n_ctx={prompt_tokens + N_GEN}, n_threads=2, repack=False,
                verbose=True) as session:
    print("budget =", session.info().used)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    said = dict(re.findall(r"^(\w+) = (\d+)$", run.stdout, re.MULTILINE))
    buffers = re.findall(r"(?:KV|compute|output) +buffer size += +([\d.]+) MiB", run.stderr)
    assert len(buffers) >= 3, run.stderr
    tensors = read_model(twin)[0].tensors.items()
    return Allowance(
        budget=int(said["budget"]),
        dense=sum(tensor.nbytes for name, tensor in tensors if "_exps." not in name),
        buffers=int(sum(map(float, buffers)) * MIB),
        process=int(said["process"]),
    )


@pytest.mark.parametrize("io", ["direct", "mmap"])
@pytest.mark.parametrize("prompt_tokens", [1, 512], ids=["decode", "prefill"])
def test_memory_is_what_was_promised(twin: Path, prompt_tokens: int, io: str) -> None:
    allowed = allowance(twin, prompt_tokens)
    try:
        with memory_group(allowed.total + 64 * MIB) as group:
            run, peak = decode_in_process(job(twin, prompt_tokens, io), group)
    except CgroupUnavailableError:
        # Without rights to limit it the promise is still measured.
        run, peak = decode_in_process(job(twin, prompt_tokens, io))
    assert run.info
    assert run.info.used <= run.info.budget
    assert run.info.io == io
    assert run.n_prompt == prompt_tokens
    assert run.prefill
    assert (run.prefill.calls_streamed > 0) == (prompt_tokens > 1)
    assert run.decode
    assert run.decode.evictions > 0
    assert peak <= allowed.total, f"{peak / MIB:.1f} MiB of {allowed}"
