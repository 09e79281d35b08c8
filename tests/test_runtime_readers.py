"""Reader threads `auto` in the compiled runtime: found by reading, remembered for the device, not trusted."""

from pathlib import Path

import pytest
from llama_tools import completion
from small_twin import EXPERTS, STEPS, write_small_twin
from tiny_models import write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.routing.twin import step_token
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig, open_model

pytestmark = pytest.mark.runtime

COUNTS = (1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("twin") / "small.gguf")


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file; its folder is not there yet."""
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache" / "readers.txt"


def threads(path: Path, config: CacheConfig) -> tuple[int, bytes]:
    """Reader threads that were chosen, and logits of a few steps."""
    with open_model(path, config, n_threads=1) as session:
        for step in range(STEPS // 4):
            session.decode([step_token(step)])
        info, logits = session.info(), session.logits().tobytes()
    assert info
    return info.n_threads, logits


@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_found_once_and_remembered(twin: Path, remembered: Path, io: str) -> None:
    plain = threads(twin, CacheConfig("4s", io=io))
    assert plain[0] == 4
    assert not remembered.exists()
    found = threads(twin, CacheConfig("4s", io=io, threads="auto"))
    assert found[0] in COUNTS
    assert found[1] == plain[1]
    head, entry, end = remembered.read_text().splitlines()
    assert (head, end) == ("remoe-edge readers 1", "end")
    device, mode, size, count, rate = entry.split()
    assert (int(device), mode, int(count)) == (twin.stat().st_dev, io, found[0])
    assert int(size) >= 4096
    assert int(rate) >= 0

    # What the file says is taken, as long as it is within bounds.
    other = 16 if found[0] < 16 else 1
    remembered.write_text(f"{head}\n{device} {mode} {size} {other} {rate}\n{end}\n")
    assert threads(twin, CacheConfig("4s", io=io, threads="auto")) == (other, plain[1])


@pytest.mark.parametrize("damage", ["", "remoe-edge readers 1\n1 direct 1 5000 1\nend\n", "\0" * 100, "x" * 20000])
def test_a_damaged_file_is_written_anew(twin: Path, remembered: Path, damage: str) -> None:
    remembered.parent.mkdir(parents=True)
    remembered.write_text(damage)
    assert threads(twin, CacheConfig("4s", threads="auto"))[0] in COUNTS
    assert len(remembered.read_text().splitlines()) == 3


def test_entries_of_other_devices_stay(twin: Path, remembered: Path) -> None:
    remembered.parent.mkdir(parents=True)
    remembered.write_text("remoe-edge readers 1\n1 mmap 4096 8 100\nend\n")
    threads(twin, CacheConfig("4s", threads="auto"))
    assert remembered.read_text().splitlines()[1] == "1 mmap 4096 8 100"
    assert len(remembered.read_text().splitlines()) == 4


def test_nothing_is_read_for_it_where_all_experts_fit(twin: Path, remembered: Path) -> None:
    assert threads(twin, CacheConfig(f"{EXPERTS}s", threads="auto"))[0] == 4
    assert not remembered.exists()


def test_nothing_is_read_for_it_in_memory(remembered: Path) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no tmpfs here")
    path = folder / f"remoe-edge-readers-{id(folder)}.gguf"
    try:
        write_small_twin(path)
        assert threads(path, CacheConfig("4s", threads="auto"))[0] == 4
    finally:
        path.unlink(missing_ok=True)
    assert not remembered.exists()


def test_a_folder_that_takes_no_file_is_no_error(twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REMOE_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    assert threads(twin, CacheConfig("4s", threads="auto"))[0] in COUNTS


@pytest.mark.parametrize("value", [0, 65, "many"])
def test_what_is_no_number_of_threads(twin: Path, value: int | str) -> None:
    with pytest.raises(RemoeError, match="must be auto or an integer from 1 to 64"):
        threads(twin, CacheConfig("4s", threads=value))


def test_flags_of_llama_cpps_tools(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=16, k=2, n_layer=3, seed=1)
    own = {"REMOE_EDGE_CACHE": str(tmp_path / "cache"), "REMOE_EDGE_RUNTIMES": str(ensure_runtime().root.parent)}
    flags = ("--no-repack", "--expert-cache", "4s")
    plain = completion(path, *flags)
    found = completion(path, *flags, "--expert-cache-threads", "auto", "--expert-prefetch", "auto", env=own)
    again = completion(path, *flags, env={**own, "LLAMA_ARG_EXPERT_CACHE_THREADS": "auto"})
    assert plain.returncode == found.returncode == again.returncode == 0, found.stderr
    assert plain.stdout == found.stdout == again.stdout
    assert "reader threads, found in" in found.stderr
    assert "prefetch auto" in found.stderr
    assert "as was found earlier on this device" in again.stderr
    wrong = completion(path, *flags, "--expert-cache-threads", "many")
    assert wrong.returncode != 0
    assert "--expert-cache-threads is a number or auto, not 'many'" in wrong.stderr + wrong.stdout
