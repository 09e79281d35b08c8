"""`convert --align` moves tensors to other boundaries, changes none of their bytes, and counts what it aligned."""

import json
import subprocess
import sys
from pathlib import Path

import gguf_maker as make
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from small_twin import EXPERTS, LAYERS, STEPS, small_trace, write_small_twin
from tiny_models import split_model

from remoe_edge import __version__
from remoe_edge.commands.convert import command
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.convert import convert, plan_conversion
from remoe_edge.gguf_io.diff import diff
from remoe_edge.gguf_io.layout import MAX_ALIGNMENT, TENSOR_TYPES, Tensor, check_alignment, read_layout, read_model
from remoe_edge.routing.twin import plan_twin, step_token, write_twin
from remoe_edge.runtime.llama import CacheConfig, load_model

POWERS = [2**n for n in range(5, 15)]


def invoke(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def data_by_name(*paths: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for path in paths for tensor in GGUFReader(path).tensors}


def starts(path: Path) -> list[int]:
    """Of every slice, one by one."""
    tensors = read_layout(path).tensors.values()
    return [tensor.start + i * tensor.slice_bytes for tensor in tensors for i in range(tensor.experts)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.sampled_from([1, 2, 3, 7, 16, 32, 45]), min_size=1, max_size=4),
    experts=st.integers(1, 9),
    before=st.sampled_from(POWERS),
    alignment=st.sampled_from(POWERS),
    parts=st.integers(1, 3),
)
def test_only_the_places_change(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    experts: int,
    before: int,
    alignment: int,
    parts: int,
) -> None:
    folder = tmp_path_factory.mktemp("align")
    inputs = make.write_experts(folder / "b.gguf", rows, experts=experts, parts=parts)
    if before != 32:
        plan = convert(inputs[0], None, folder / "c.gguf", alignment=before)
        inputs = [file.target for file in plan.files]
    if before == alignment:
        with pytest.raises(RemoeError, match=f"aligned to {alignment} bytes already"):
            convert(inputs[0], None, folder / "o.gguf", alignment=alignment)
        return
    plan = convert(inputs[-1], None, folder / "o.gguf", alignment=alignment)
    outputs = [file.target for file in plan.files]
    assert len(outputs) == len(inputs)
    assert data_by_name(*inputs) == data_by_name(*outputs)
    assert list(data_by_name(*inputs)) == list(data_by_name(*outputs))
    for old, new in zip(inputs, outputs, strict=True):
        # The gguf package and llama.cpp take the key from each part.
        assert GGUFReader(new).alignment == alignment
        assert all(tensor.start % alignment == 0 for tensor in read_layout(new).tensors.values())
        position = min(tensor.start for tensor in read_layout(new).tensors.values())
        for tensor in read_layout(new).tensors.values():
            assert tensor.start == position
            position += -(-tensor.nbytes // alignment) * alignment
        assert new.stat().st_size == position
        added = {"general.alignment"} | ({"remoe.tool.version"} if new == outputs[0] else set())
        assert read_layout(new).fields.keys() - read_layout(old).fields.keys() <= added
    slices = plan.slice_alignment()
    assert slices.slices == len(rows) * experts
    for counted, paths in (slices.aligned_before, inputs), (slices.aligned, outputs):
        assert counted == sum(start % alignment == 0 for path in paths for start in starts(path))
    assert slices.slice_bytes == sorted({128 * count for count in rows})
    assert slices.aligned >= len(rows)
    if all(128 * count % alignment == 0 for count in rows):
        assert slices.aligned == slices.slices


@settings(deadline=None)
@given(
    start=st.integers(0, 1 << 20),
    slice_bytes=st.integers(1, 1 << 14),
    experts=st.integers(1, 300),
    alignment=st.sampled_from(POWERS),
)
def test_aligned_slices_are_counted_as_if_one_by_one(
    start: int, slice_bytes: int, experts: int, alignment: int
) -> None:
    tensor = Tensor("blk.0.ffn_up_exps.weight", TENSOR_TYPES[0], (1, 1, experts), start, slice_bytes * experts)
    expected = sum((start + i * slice_bytes) % alignment == 0 for i in range(experts))
    assert tensor.aligned_slices(alignment) == expected


@given(alignment=st.integers(-(1 << 21), 1 << 21))
def test_alignments_are_powers_of_two(alignment: int) -> None:
    if alignment in [2**n for n in range(5, 21)]:
        check_alignment(alignment)
    else:
        with pytest.raises(RemoeError, match=f"an alignment of {alignment} bytes is not possible; use a power of two"):
            check_alignment(alignment)


def test_there_and_back_gives_the_same_layout(tmp_path: Path) -> None:
    (base,) = make.write_experts(tmp_path / "b.gguf", [3, 32])
    there, back, again = tmp_path / "there.gguf", tmp_path / "back.gguf", tmp_path / "again.gguf"
    convert(base, None, there, alignment=4096)
    convert(there, None, back, alignment=32)
    convert(back, None, again, alignment=4096)
    assert again.read_bytes() == there.read_bytes()
    sizes = [path.stat().st_size for path in (base, there, back)]
    # What is left is the two keys.
    assert sizes[0] < sizes[2] <= sizes[0] + 128 < sizes[1]


def test_with_a_router_in_one_go(tmp_path: Path) -> None:
    base = make.write_base(tmp_path / "b.gguf", tensors_per_part=4)
    router = make.write_router(tmp_path / "r.safetensors", make.router_values())
    convert(base, router, tmp_path / "two.gguf")
    convert(tmp_path / "two-00001-of-00003.gguf", None, tmp_path / "steps.gguf", alignment=4096)
    plan = convert(base, router, tmp_path / "one.gguf", alignment=4096)
    assert len(plan.replacements) == 3
    for number in (1, 2, 3):
        one, steps = (tmp_path / f"{name}-0000{number}-of-00003.gguf" for name in ("one", "steps"))
        assert data_by_name(one) == data_by_name(steps)
        assert one.stat().st_size == steps.stat().st_size
        assert read_layout(one).alignment == 4096
    again = convert(tmp_path / "one-00001-of-00003.gguf", router, tmp_path / "again.gguf", alignment=4096)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("again-*"))] == [
        path.read_bytes() for path in sorted(tmp_path.glob("one-*"))
    ]
    assert "general.alignment" not in again.metadata


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        (4095, "an alignment of 4095 bytes is not possible; use a power of two from 32 to 1048576, such as 4096"),
        (16, "an alignment of 16 bytes is not possible"),
        (0, "an alignment of 0 bytes"),
        (-4096, "an alignment of -4096 bytes"),
        (2 * MAX_ALIGNMENT, "an alignment of 2097152 bytes is not possible"),
        (64, r"b\.gguf: its tensors are aligned to 64 bytes already; there is nothing to do"),
    ],
)
def test_refusals(tmp_path: Path, alignment: int, message: str) -> None:
    (base,) = make.write_experts(tmp_path / "b.gguf", [3], alignment=64)
    for attempt in plan_conversion, convert:
        with pytest.raises(RemoeError, match=message):
            attempt(base, None, tmp_path / "o.gguf", alignment=alignment)
    assert list(tmp_path.iterdir()) == [base]


def test_a_model_without_experts_and_a_call_without_a_wish_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "b.gguf"
    base.write_bytes(make.gguf(tensors=[make.tensor("output.weight", (4,))], data=bytes(32)))
    with pytest.raises(RemoeError, match="has no expert tensors to align: it is not a Mixture-of-Experts model"):
        convert(base, None, tmp_path / "o.gguf", alignment=4096)
    with pytest.raises(RemoeError, match="nothing to convert; name a router, or an alignment"):
        convert(base, None, tmp_path / "o.gguf")
    (moe,) = make.write_experts(tmp_path / "m.gguf", [3])
    with pytest.raises(RemoeError, match="is the same file as the input"):
        convert(moe, None, moe, alignment=4096, force=True)


def test_memory_stays_bounded_for_a_tensor_of_very_many_slices(tmp_path: Path) -> None:
    """10 GB in 300 million slices, sparse: neither counting nor copying may follow their number."""
    base, out = tmp_path / "b.gguf", tmp_path / "o.gguf"
    experts = 300_000_000
    base.write_bytes(make.gguf(tensors=[make.tensor("blk.0.ffn_up_exps.weight", (8, 1, experts))]))
    with base.open("r+b") as file:
        file.truncate(base.stat().st_size + 32 * experts)
        file.seek(base.stat().st_size - 7)
        file.write(b"the end")
    program = """if True:
        import sys
        from pathlib import Path
        from remoe_edge.gguf_io.convert import convert
        plan = convert(Path(sys.argv[1]), None, Path(sys.argv[2]), alignment=4096)
        print(plan.slice_alignment().aligned)
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """
    done = subprocess.run([sys.executable, "-c", program, base, out], stdout=subprocess.PIPE, check=True, text=True)
    aligned, peak = map(int, done.stdout.split())
    assert aligned == -(-experts // 128)
    assert peak * 1024 < 300_000_000
    assert out.stat().st_blocks * 512 < 1 << 20
    tensor = read_layout(out).tensors["blk.0.ffn_up_exps.weight"]
    with out.open("rb") as file:
        file.seek(tensor.end - 7)
        assert file.read(7) == b"the end"


def test_command_aligns_and_says_what(tmp_path: Path) -> None:
    (base,) = make.write_experts(tmp_path / "b.gguf", [32, 45], experts=4)
    out = tmp_path / "o.gguf"
    odd = "slices of 5760 bytes are no multiple of it, only their tensors are aligned"
    planned = invoke(base, "-o", out, "--align", 4096, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert not out.exists()
    size = plan_conversion(base, None, out, alignment=4096).output_bytes
    lines = planned.stdout.splitlines()
    assert f"5 of 8 expert slices start on a multiple of 4096 (before: 0); {odd}" in lines
    assert "  general.alignment = 4096" in lines
    assert f"  remoe.tool.version = '{__version__}'" in lines
    assert any(line.endswith(f"in all; output +{size - base.stat().st_size} bytes") for line in lines)
    assert "router" not in planned.stdout

    written = invoke(base, "-o", out, "--align", 4096)
    assert written.exit_code == 0
    assert f"5 of 8 expert slices start on a multiple of 4096 (before: 0); {odd}" in written.stderr
    assert out.stat().st_size == size
    compared = invoke("--diff", base, out)
    assert compared.stdout.splitlines() == [
        f"remoe.tool.version: absent -> '{__version__}'",
        "general.alignment: absent -> 4096",
        "0 tensors differ, 4 are the same; 2 metadata keys differ",
    ]
    again = invoke(out, "-o", tmp_path / "again.gguf", "--align", 4096)
    assert "aligned to 4096 bytes already" in str(again.exception)


def test_command_json(tmp_path: Path) -> None:
    (base,) = make.write_experts(tmp_path / "b.gguf", [32])
    planned = json.loads(invoke(base, "-o", tmp_path / "o.gguf", "--align", 4096, "--dry-run", "--json").stdout)
    assert planned["expert_slices"] == {
        "alignment": 4096,
        "slices": 4,
        "aligned_before": 0,
        "aligned": 4,
        "slice_bytes": [4096],
    }
    assert (planned["replaced"], planned["kept"]) == ([], [])
    assert planned["input_bytes"] == base.stat().st_size < planned["output_bytes"]


@pytest.mark.parametrize("alignment", [32, 4096, 16384])
def test_twins_are_written_aligned(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "t.gguf"
    twin = plan_twin(small_trace(), hidden=256, ff=256, alignment=alignment)
    write_twin(twin, path)
    layout = read_layout(path)
    assert layout.alignment == alignment
    experts = [tensor for tensor in layout.tensors.values() if tensor.experts]
    assert len(experts) == 3 * LAYERS
    # 256 x 256 weights of Q4_0 are 9 pages.
    whole = sum(tensor.aligned_slices(alignment) == EXPERTS for tensor in experts)
    assert whole == (0 if alignment == 16384 else len(experts))
    header = min(tensor.start for tensor in layout.tensors.values())
    assert path.stat().st_size == header + twin.nbytes + twin.padding_bytes


def test_twins_refuse_other_alignments() -> None:
    with pytest.raises(RemoeError, match="an alignment of 4000 bytes is not possible"):
        plan_twin(small_trace(), hidden=256, ff=256, alignment=4000)


@pytest.mark.runtime
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_the_runtime_sees_the_same_model(tmp_path: Path, io: str, parts: int) -> None:
    """Logits to the bit and counters, of a file whose experts straddle pages and of the same on page boundaries."""
    base = tmp_path / "base.gguf"
    write_twin(plan_twin(small_trace(), hidden=256, ff=256, alignment=32), base)
    if parts > 1:
        base = split_model(base, tmp_path, parts)[0]
    plan = convert(base, None, tmp_path / "aligned.gguf", alignment=4096)
    slices = plan.slice_alignment()
    assert slices.aligned == slices.slices == 3 * LAYERS * EXPERTS
    assert slices.aligned_before < slices.slices
    assert not diff(base, plan.files[0].target).tensors

    seen = []
    for path in base, plan.files[0].target:
        with (
            load_model(path, CacheConfig("6s", "lfu", io)) as model,
            model.session(n_ctx=128, n_threads=2) as session,
        ):
            prompt = [step_token(step) for step in range(20)]
            session.decode(prompt, all_logits=True)
            rows = [session.all_logits()]
            session.reset_stats()
            for _ in range(40):
                session.decode([int(rows[-1][-1].argmax())])
                rows.append(session.logits()[None])
            stats, info = session.stats(), session.info()
            assert stats
            assert info
            seen.append((np.concatenate(rows), stats, info.used))
    (logits, stats, used), (aligned_logits, aligned_stats, aligned_used) = seen
    # A slot has a page to spare for a slice that straddles pages.
    assert used - aligned_used == 6 * 3 * LAYERS * 4096
    assert np.isfinite(logits).all()
    assert logits.tobytes() == aligned_logits.tobytes()
    for name in "hits", "misses", "evictions", "calls", "calls_streamed", "reads", "bytes_demand":
        assert getattr(stats, name) == getattr(aligned_stats, name), name
    assert stats.evictions > 0


@pytest.mark.runtime
def test_the_resident_run_takes_it_too(tmp_path: Path) -> None:
    """Without the cache, mapped and read: an alignment of a whole MiB shifts everything."""
    base = write_small_twin(tmp_path / "base.gguf")
    convert(base, None, tmp_path / "aligned.gguf", alignment=MAX_ALIGNMENT)
    outputs = []
    for path in base, tmp_path / "aligned.gguf":
        for mmap in (False, True):
            with load_model(path, None, mmap=mmap, repack=False) as model, model.session(n_threads=2) as session:
                session.decode([step_token(step) for step in range(STEPS)], all_logits=True)
                outputs.append(session.all_logits().tobytes())
    assert len(set(outputs)) == 1
    assert read_model(tmp_path / "aligned.gguf")[0].alignment == MAX_ALIGNMENT
