"""Experts loaded before calls: output equal to the bit, counters true, a bad file is a cold start."""

from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.runtime.llama import CacheConfig, CacheInfo, CacheStats, load_model

pytestmark = pytest.mark.runtime

N_EXPERT, K, N_LAYER = 16, 3, 3
TOKENS = list(range(20, 44))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=N_EXPERT, k=K, n_layer=N_LAYER, seed=7)
    return path


def evaluate(
    path: Path, cache: CacheConfig | None, *, wait: bool = True, repack: bool = False, prefill: int = 0
) -> tuple[bytes, CacheInfo | None, CacheStats | None]:
    """Bytes of all logits: of a prompt, if there is one, and of tokens one by one; what the cache did meanwhile."""
    with (
        load_model(path, cache, mmap=False, repack=repack) as loaded,
        loaded.session(n_threads=1) as session,
    ):
        if wait:
            session.wait_loaded()
        found = b""
        if prefill:
            session.decode((TOKENS * 8)[:prefill], all_logits=True)
            found += session.all_logits().tobytes()
        for token in TOKENS:
            session.decode([token])
            found += session.logits().tobytes()
        return found, session.info(), session.stats()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("repack", [True, False])
def test_all_experts_are_there_before_the_first_call(model: Path, repack: bool, wait: bool) -> None:
    resident, _, _ = evaluate(model, None, repack=repack)
    for budget in f"{N_EXPERT}s", "auto":
        config = CacheConfig(budget, repack="on" if repack else "off")
        cached, info, stats = evaluate(model, config, repack=repack, wait=wait)
        assert cached == resident
        assert info
        assert stats
        assert stats.evictions == 0
        if wait:
            assert info.bytes_loaded == info.expert_bytes
            assert (stats.misses, stats.reads, stats.bytes_demand, stats.bytes_prefetch) == (0, 0, 0, 0)


@pytest.mark.parametrize("slots", [K, 8])
@pytest.mark.parametrize("io", ["direct", "mmap"])
@pytest.mark.parametrize("prefill", [0, 40])
def test_a_warm_start_changes_nothing_but_reads(model: Path, tmp_path: Path, slots: int, io: str, prefill: int) -> None:
    resident, _, _ = evaluate(model, None, prefill=prefill)
    hot = tmp_path / "hot"
    found = []
    for policy, prefetch, wait in (
        ("next-use", "off", True),
        ("next-use", "off", True),
        ("next-use", "off", False),
        ("lru", "off", True),
        ("lfu", "router", False),
    ):
        config = CacheConfig(f"{slots}s", policy, io, prefetch=prefetch, warm=str(hot))
        logits, info, stats = evaluate(model, config, wait=wait, prefill=prefill)
        assert logits == resident, (policy, prefetch, wait)
        assert info
        assert stats
        assert stats.evictions > 0
        found.append((info, stats))
        lines = hot.read_text().splitlines()
        assert lines[0] == "remoe-edge hot set 1"
        assert lines[-1] == "end"
        assert [len(line.split()) for line in lines[3:-1]] == [slots] * N_LAYER
        assert set(tmp_path.iterdir()) == {hot}
    (cold, cold_stats), (warm, warm_stats) = found[:2]
    assert (cold.warm, cold.bytes_loaded) == ("there is no such file yet", 0)
    assert (warm.warm, warm.bytes_loaded) == ("loaded", warm.expert_bytes * slots // N_EXPERT)
    # What was loaded is counted apart: the counters have what calls asked for, and nothing else.
    for stats in cold_stats, warm_stats:
        assert stats.reads == 3 * stats.misses
        assert stats.bytes_demand == stats.misses * cold.expert_bytes // (N_LAYER * N_EXPERT)


def test_the_first_token_finds_what_the_last_run_used(model: Path, tmp_path: Path) -> None:
    hot = str(tmp_path / "hot")
    misses = []
    for _ in range(2):
        with (
            load_model(model, CacheConfig("8s", warm=hot), repack=False) as loaded,
            loaded.session(n_threads=1) as session,
        ):
            session.wait_loaded()
            for token in (20, 21):
                session.decode([token])
            stats = session.stats()
            assert stats
            misses.append(stats.misses)
    assert misses[0] > 0
    assert misses[1] == 0


@pytest.mark.parametrize(
    ("content", "reason", "replaced"),
    [
        (b"remoe-edge hot set 2\n", "its version is not 1", True),
        (b"remoe-edge hot set 1\nmodel ffffffffffffffff\n", "it was written for another model", True),
        (b"remoe-edge hot set 1\nmo", "it is damaged", True),
        (b"", "it is not a hot set", True),
        (b"my shopping list", "it is not a hot set", False),
        (bytes(range(256)) * 4096, "it is not a hot set", False),
    ],
)
def test_a_bad_file_is_a_cold_start(model: Path, tmp_path: Path, content: bytes, reason: str, replaced: bool) -> None:
    resident, _, _ = evaluate(model, None)
    hot = tmp_path / "hot"
    hot.write_bytes(content)
    logits, info, _ = evaluate(model, CacheConfig("4s", warm=str(hot)))
    assert logits == resident
    assert info
    assert (info.warm, info.bytes_loaded) == (reason, 0)
    assert (hot.read_bytes() != content) == replaced
    if replaced:
        _, info, _ = evaluate(model, CacheConfig("4s", warm=str(hot)))
        assert info
        assert info.warm == "loaded"


def test_another_router_is_another_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_tiny_model(other, "qwen3moe", quant="Q4_0", n_expert=N_EXPERT, k=K, n_layer=N_LAYER, seed=8)
    hot = str(tmp_path / "hot")
    evaluate(model, CacheConfig("4s", warm=hot))
    _, info, _ = evaluate(other, CacheConfig("4s", warm=hot))
    assert info
    assert info.warm == "it was written for another model"


def test_a_place_that_cannot_be_written_is_refused_at_load(model: Path, tmp_path: Path) -> None:
    hot = tmp_path / "no" / "hot"
    with pytest.raises(RemoeError, match=r"hot set .*no/hot is not there and cannot be written: .*No such file"):
        evaluate(model, CacheConfig("4s", warm=str(hot)))
    with pytest.raises(RemoeError, match="too long"):
        evaluate(model, CacheConfig("4s", warm="x" * 200))


def test_a_model_that_was_not_used_leaves_the_file_as_it_is(model: Path, tmp_path: Path) -> None:
    hot = tmp_path / "hot"
    evaluate(model, CacheConfig("4s", warm=str(hot)))
    before = hot.read_bytes()
    with load_model(model, CacheConfig("4s", warm=str(hot))):
        pass
    evaluate(model, CacheConfig(f"{N_EXPERT}s", warm=str(hot)))
    assert hot.read_bytes() == before
