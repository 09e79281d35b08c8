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
BUDGET = 118 * MIB  # 16 slots a layer take 117 MiB of it, 5 of them what the policy has learned


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 480 MB of experts, whose slices straddle pages: each slot has a page to spare, which must be counted."""
    path = tmp_path_factory.mktemp("twin") / "twin.gguf"
    write_twin(plan_twin(packaged_trace(), hidden=1024, ff=256, alignment=32), path)
    return path


@dataclass(frozen=True)
class Needs:
    """Bytes of a decode run, by what they are for."""

    dense: int
    buffers: int
    """KV cache, compute and output buffers, as llama.cpp prints them."""
    process: int
    """Before there is a model."""

    @property
    def total(self) -> int:
        return self.dense + self.buffers + self.process


def job(twin: Path, prompt_tokens: int, cache: CacheConfig) -> Job:
    prompt = "".join(f"w{step % 299:05d}" for step in range(prompt_tokens))
    return Job(str(twin), prompt, N_GEN, 2, cache, mmap=False, repack=False)


def needs(twin: Path, prompt_tokens: int) -> Needs:
    script = f"""
from pathlib import Path
from remoe_edge.measure.worker import process_memory
from remoe_edge.runtime.llama import CacheConfig, open_model, system_info
system_info()
print("process =", process_memory("self"))
with open_model(Path({str(twin)!r}), CacheConfig("16s"), n_ctx={prompt_tokens + N_GEN}, n_threads=2, repack=False,
                verbose=True):
    pass
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    process = re.search(r"^process = (\d+)$", run.stdout, re.MULTILINE)
    buffers = re.findall(r"(?:KV|compute|output) +buffer size += +([\d.]+) MiB", run.stderr)
    assert process, run.stdout
    assert len(buffers) >= 3, run.stderr
    tensors = read_model(twin)[0].tensors.items()
    return Needs(
        dense=sum(tensor.nbytes for name, tensor in tensors if "_exps." not in name),
        buffers=int(sum(map(float, buffers)) * MIB),
        process=int(process[1]),
    )


@pytest.mark.parametrize("prompt_tokens", [1, 512], ids=["decode", "prefill"])
def test_memory_is_what_was_promised(twin: Path, prompt_tokens: int) -> None:
    """Peak of anonymous and shared memory: budget + dense weights + buffers + process without a model, at most."""
    rest = needs(twin, prompt_tokens)

    # What llama.cpp keeps beside buffers (vocabulary, graphs) is the same without the cache.
    resident, resident_peak = decode_in_process(job(twin, prompt_tokens, CacheConfig("off")))
    bookkeeping = resident_peak - (resident.model_bytes - rest.dense) - rest.total
    assert bookkeeping < 8 * MIB, f"{bookkeeping / MIB:.1f} MiB beside {rest}"

    for io in ("direct", "mmap"):
        try:
            with memory_group(BUDGET + rest.total + 64 * MIB) as group:
                run, peak = decode_in_process(job(twin, prompt_tokens, CacheConfig(str(BUDGET), io=io)), group)
        except CgroupUnavailableError:
            # Without rights to set a limit the promise is still measured.
            run, peak = decode_in_process(job(twin, prompt_tokens, CacheConfig(str(BUDGET), io=io)))
        assert run.info
        assert run.info.used <= run.info.budget == BUDGET
        assert (run.info.io, run.info.n_slots, run.n_prompt) == (io, 16, prompt_tokens)
        assert run.prefill
        assert (run.prefill.calls_streamed > 0) == (prompt_tokens > 1)
        assert run.decode
        assert run.decode.evictions > 0
        assert run.logits_sha256 == resident.logits_sha256
        assert peak <= BUDGET + rest.total, f"{peak / MIB:.1f} MiB with {rest}"
        # Of the budget no more was taken than the cache said, give or take what malloc rounds up.
        assert peak <= run.info.used + rest.total + bookkeeping + MIB, f"{peak / MIB:.1f} MiB with {rest}"


NEIGHBOUR = "import sys; taken = bytearray(b'x') * int(sys.argv[1]); print('taken', flush=True); input()"


def test_a_neighbour_that_takes_the_rest_of_the_memory_changes_nothing(twin: Path) -> None:
    """The cache has its budget from the start: it takes no more, gives nothing away, and the output is the same."""
    rest, taken = needs(twin, 1), 256 * MIB
    alone, _ = decode_in_process(job(twin, 1, CacheConfig(str(BUDGET))))
    try:
        with memory_group(BUDGET + rest.total + taken + 48 * MIB) as group:
            command = group.command([sys.executable, "-c", NEIGHBOUR, str(taken)])
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as neighbour:
                try:
                    assert neighbour.stdout is not None
                    assert neighbour.stdout.readline() == b"taken\n"
                    before = group.memory()
                    assert before >= taken
                    run, peak = decode_in_process(job(twin, 1, CacheConfig(str(BUDGET))), group)
                    assert group.oom_kills() == 0
                finally:
                    neighbour.communicate(b"\n")
    except CgroupUnavailableError:
        pytest.skip("needs a control group")
    assert run.info
    assert alone.info
    assert run.info.used == alone.info.used <= run.info.budget == BUDGET
    assert run.logits_sha256 == alone.logits_sha256
    assert peak - before <= BUDGET + rest.total
