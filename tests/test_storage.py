import os
from pathlib import Path

import pytest
from small_twin import EXPERTS, LAYERS, write_small_twin

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.storage import Slice, expert_slices, measure_bandwidth

MIB = 1 << 20


def test_slices_are_those_of_the_expert_tensors(tmp_path: Path) -> None:
    layouts = read_model(write_small_twin(tmp_path / "twin.gguf"))
    slices = expert_slices(layouts)
    assert len(slices) == 3 * LAYERS * EXPERTS
    assert {piece.length for piece in slices} == {256 * 256 // 32 * 18}
    up = layouts[0].tensors["blk.1.ffn_up_exps.weight"]
    own = [piece for piece in slices if up.start <= piece.start < up.end]
    assert [piece.start for piece in own] == [up.start + index * own[0].length for index in range(EXPERTS)]
    assert own[-1].start + own[-1].length == up.end


@pytest.mark.parametrize("depth", [1, 4])
def test_bandwidth_is_positive_and_says_how_it_was_measured(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 * MIB + 100))
    # Unaligned slices, the last one ending with the file.
    slices = [Slice(path, 100 + index * MIB // 4, MIB // 4) for index in range(16)]
    bandwidth = measure_bandwidth(slices, depth, round_bytes=MIB)
    assert bandwidth.bytes_per_s > 0
    assert (bandwidth.read_bytes, bandwidth.depth) == (MIB // 4, depth)


def test_a_filesystem_without_direct_reads_is_read_through_the_page_cache() -> None:
    # tmpfs refused O_DIRECT until Linux 6.6; since then it accepts it, and either answer is right.
    path = Path("/dev/shm") / f"remoe-edge-test-{os.getpid()}"
    try:
        path.write_bytes(bytes(MIB))
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
            direct = True
        except OSError:
            direct = False
        assert measure_bandwidth([Slice(path, 0, MIB)], 2).direct == direct
    finally:
        path.unlink(missing_ok=True)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    with pytest.raises(RemoeError, match="ends before offset 12288"):
        measure_bandwidth([Slice(path, 4096, 8192)], 1)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match="cannot be read"):
        measure_bandwidth([Slice(tmp_path / "missing", 0, 4096)], 1)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(RemoeError, match="no experts"):
        measure_bandwidth([], 1)
