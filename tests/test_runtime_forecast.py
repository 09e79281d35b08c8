"""Prefetch `auto` in the compiled runtime: forecasts are judged, good ones are read ahead, output stays as it is."""

from pathlib import Path

import pytest
from small_twin import EXPERTS, LAYERS, STEPS, TOP_K, write_small_twin
from tiny_models import write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.routing.twin import step_token
from remoe_edge.runtime.llama import CacheConfig, CacheStats, load_model, open_model

pytestmark = pytest.mark.runtime

SLOTS = 6
WALKS = 3
WRONG = "LLAMA_EXPERT_TEST_FORECAST_WRONG"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("twin") / "small.gguf")


def walk(path: Path, prefetch: str) -> tuple[bytes, CacheStats, list[CacheStats]]:
    """The logits of all steps, walked several times, and the counters."""
    logits = []
    with open_model(
        path, CacheConfig(f"{SLOTS}s", prefetch=prefetch), n_ctx=WALKS * STEPS + 16, n_threads=1
    ) as session:
        for step in range(WALKS * STEPS):
            session.decode([step_token(step % STEPS)])
            logits.append(session.logits().tobytes())
        info, stats = session.info(), session.stats()
        layers = [session.stats(layer) for layer in range(LAYERS)]
    assert info
    assert stats
    assert info.prefetch == prefetch
    return b"".join(logits), stats, [layer for layer in layers if layer]


def test_right_forecasts_are_read_ahead(twin: Path) -> None:
    plain, without, _ = walk(twin, "off")
    logits, stats, layers = walk(twin, "auto")
    assert logits == plain
    assert (without.forecasts, without.bytes_prefetch, without.forecast_precision) == (0, 0, None)
    # The first layer has nothing in front of it, the others have a forecast for every call.
    assert layers[0].forecasts == 0
    assert [layer.forecasts for layer in layers[1:]] == [WALKS * STEPS] * (LAYERS - 1)
    assert stats.forecast_precision is not None
    assert stats.forecast_precision > 0.98
    assert stats.forecast_recall is not None
    assert stats.forecast_recall > 0.98
    # Judged first, read then.
    assert 0.85 * stats.forecasts < stats.forecasts_read < stats.forecasts
    assert stats.bytes_prefetch > 0
    assert stats.forecast_used <= min(stats.forecast_experts, stats.forecast_needed)
    assert stats.forecast_needed <= TOP_K * stats.forecasts
    assert stats.forecast_ns > 0


def test_wrong_forecasts_are_not(twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = walk(twin, "off")
    monkeypatch.setenv(WRONG, "0.9")
    logits, stats, layers = walk(twin, "auto")
    assert logits == plain
    assert stats.forecast_precision is not None
    assert stats.forecast_precision < 0.4
    assert stats.bytes_prefetch == stats.forecasts_read == 0
    # One in eight is still judged.
    assert all(WALKS * STEPS // 10 < layer.forecasts < WALKS * STEPS // 4 for layer in layers[1:])

    # Told to read all the same, it reads what is not needed, and the output is what it was.
    logits, stats, _ = walk(twin, "router")
    assert logits == plain
    assert stats.forecasts_read == stats.forecasts == WALKS * STEPS * (LAYERS - 1)
    assert stats.bytes_prefetch > 0
    assert stats.bytes_prefetch_used < 0.6 * stats.bytes_prefetch


def test_nothing_is_forecast_where_everything_fits(twin: Path) -> None:
    with open_model(twin, CacheConfig(f"{EXPERTS}s", prefetch="auto"), n_threads=1) as session:
        session.wait_loaded()
        for step in range(STEPS):
            session.decode([step_token(step)])
        stats = session.stats()
    assert stats
    assert (stats.forecasts, stats.misses, stats.bytes_prefetch) == (0, 0, 0)


def test_prefill_and_batches_of_tokens(tmp_path: Path) -> None:
    """Random weights forecast badly, and a prompt streams: auto gives what off gives."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=16, k=2, n_layer=3, seed=1)
    results = []
    for prefetch in ("off", "auto"):
        with open_model(path, CacheConfig("4s", prefetch=prefetch), n_threads=1, repack=False) as session:
            for tokens in [
                list(range(5, 60)),
                [7],
                [8, 9],
                [10],
                list(range(20, 24)),
                *([token] for token in range(5, 60)),
            ]:
                session.decode(tokens)
                results.append((prefetch, session.logits().tobytes()))
    half = len(results) // 2
    assert [logits for _, logits in results[:half]] == [logits for _, logits in results[half:]]


def test_refused_with_a_route_bias(twin: Path) -> None:
    with (
        pytest.raises(RemoeError, match="use it without --expert-prefetch"),
        load_model(twin, CacheConfig("6s", prefetch="auto", route_bias=0.5)),
    ):
        pass


def test_a_model_without_usable_routers_is_not_read_ahead(tmp_path: Path) -> None:
    """One MoE layer has no next one: `router` says so, `auto` is off."""
    path = tmp_path / "one.gguf"
    write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=16, k=2, n_layer=1, seed=1)
    with (
        pytest.raises(RemoeError, match="finds no routers that it can use"),
        open_model(path, CacheConfig("4s", prefetch="router"), n_threads=1),
    ):
        pass
    with open_model(path, CacheConfig("4s", prefetch="auto"), n_threads=1) as session:
        session.decode([5])
        info = session.info()
    assert info
    assert info.prefetch == "off"
