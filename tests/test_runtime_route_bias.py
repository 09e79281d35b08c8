"""Routing that prefers experts in the cache: what is chosen, that it is off unless asked for, and that it is told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from observe import Observation, observe_routing
from test_runtime_cache import completion, tool
from tiny_models import write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.routing.policies import Layer
from remoe_edge.routing.simulate import replay_layer
from remoe_edge.runtime.llama import CacheConfig, CacheStats, Logits, load_model, open_model

pytestmark = pytest.mark.runtime

N_EXPERT, K, N_LAYER, SLOTS = 16, 3, 3, 6
TOKENS = np.random.default_rng(5).integers(5, 60, 60).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bias"), "qwen3moe")


def tiny(folder: Path, arch: str, **options: bool) -> Path:
    path = folder / f"{arch}.gguf"
    shape = {"n_expert": N_EXPERT, "k": K, "n_layer": N_LAYER, "hidden": 256, "ff": 256}
    return write_tiny_model(path, arch, "Q4_0", **shape, **options, seed=3)


def decode(model: Path, cache: CacheConfig, *, threads: int = 1) -> tuple[Logits, CacheStats]:
    """Logits after each of TOKENS, given one by one, and what the cache did."""
    with open_model(model, cache, n_ctx=64, n_threads=threads, repack=False) as session:
        rows = []
        for token in TOKENS:
            session.decode([token])
            rows.append(session.logits())
        stats = session.stats()
        assert stats is not None
        return np.stack(rows), stats


def observe(model: Path, **overrides: str | int | float) -> Observation:
    keys = {f"expert_cache.{key}": value for key, value in overrides.items()}
    return observe_routing(model, TOKENS[:1], len(TOKENS), forced=TOKENS[1:], overrides=keys)


@pytest.mark.parametrize(("policy", "keep"), [("lru", 1), ("next-use", 1), ("lfu", 2), ("lru", 0)])
def test_choice_is_that_of_the_paper(model: Path, policy: str, keep: int) -> None:
    """Recomputed from the routers' logits and a simulated cache: z + lambda * mean range for what has a slot."""
    bias = 0.25
    seen = observe(model, budget=f"{SLOTS}s", policy=policy, route_bias=bias, route_keep=keep)
    changed = 0
    for layer in range(N_LAYER):
        chosen = [tuple(map(int, row)) for row in seen.ids[:, layer]]
        steps = replay_layer(Layer(N_EXPERT, K, SLOTS, chosen), policy)
        resident: set[int] = set()
        ranges: list[float] = []
        for step, (_, missing, victims) in enumerate(steps):
            scores = seen.router[step, layer].astype(np.float64)
            ranges.append(float(scores.max() - scores.min()))
            bonus = np.array([bias * np.mean(ranges) if expert in resident else 0.0 for expert in range(N_EXPERT)])
            own = np.argsort(-scores, kind="stable").tolist()
            rest = sorted(own[keep:], key=lambda expert: -(scores + bonus)[expert])
            assert list(chosen[step]) == [*own[:keep], *rest][:K], (layer, step)
            changed += set(chosen[step]) != set(own[:K])
            resident = (resident | set(missing)) - set(victims)
    assert changed > len(TOKENS) * N_LAYER // 10


@pytest.mark.parametrize("arch", ["qwen3moe", "olmoe", "gpt-oss", "deepseek2"])
def test_a_vanishing_bias_changes_nothing_and_a_large_one_saves_reads(tmp_path: Path, arch: str) -> None:
    """deepseek2: a sigmoid with a bias that is added for the choice only."""
    path = tiny(tmp_path, arch, selection_bias=True) if arch == "deepseek2" else tiny(tmp_path, arch)
    own, stats = decode(path, CacheConfig(f"{SLOTS}s"))
    same, stats_same = decode(path, CacheConfig(f"{SLOTS}s", route_bias=1e-9))
    other, stats_other = decode(path, CacheConfig(f"{SLOTS}s", route_bias=0.5))
    assert same.tobytes() == own.tobytes()
    assert stats_same.misses == stats.misses
    assert other.tobytes() != own.tobytes()
    assert stats_other.misses < 0.7 * stats.misses
    assert stats_other.bytes_demand < 0.7 * stats.bytes_demand


def test_weights_come_from_the_models_own_probabilities(model: Path, tmp_path: Path) -> None:
    """The first layer sees the same input with and without bias: an expert that both choose has the same weight."""
    traces = []
    for bias in (None, 0.5):
        with open_model(model, CacheConfig(f"{SLOTS}s", route_bias=bias), n_threads=1, repack=False) as session:
            session.trace_start(tmp_path / f"{bias}.npz", probs=True)
            for token in TOKENS:
                session.decode([token])
            session.trace_stop()
        traces.append(np.load(tmp_path / f"{bias}.npz"))
    own, biased = traces
    scores = observe(model, budget=f"{SLOTS}s").router[:, 0].astype(np.float64)
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    for trace in traces:
        chosen = np.take_along_axis(probs, trace["ids"][:, 0].astype(int), axis=1)
        np.testing.assert_allclose(trace["probs"][:, 0], chosen, rtol=1e-5)
    assert (own["ids"][:, 0, 0] == biased["ids"][:, 0, 0]).all(), "the router's first choice stays"
    assert (own["ids"][:, 0] != biased["ids"][:, 0]).any()
    assert "route_bias" not in json.loads(str(own["meta"]))
    assert json.loads(str(biased["meta"]))["route_bias"] == 0.5


def test_output_does_not_depend_on_time(model: Path) -> None:
    """Threads, the way of reading and its speed change nothing, nor does a prompt that streams through the slots."""
    prompt = np.random.default_rng(6).integers(5, 60, 40).tolist()

    def run(threads: int, io: str) -> bytes:
        cache = CacheConfig(f"{SLOTS}s", io=io, route_bias=0.3)
        with open_model(model, cache, n_ctx=128, n_threads=threads, repack=False) as session:
            session.decode(prompt)
            rows = [session.logits()]
            for token in TOKENS:
                session.decode([token])
                rows.append(session.logits())
            stats = session.stats()
            assert stats is not None
            assert stats.calls_streamed > 0
            return np.stack(rows).tobytes()

    first = run(1, "direct")
    assert all(run(*way) == first for way in ((1, "direct"), (2, "mmap")))


def test_tokens_evaluated_together_are_not_touched(model: Path) -> None:
    logits = []
    for bias in (None, 4.0):
        with open_model(model, CacheConfig(f"{SLOTS}s", route_bias=bias), n_threads=1, repack=False) as session:
            for start in (0, 20):
                session.decode(TOKENS[start : start + 20], all_logits=True)
                logits.append(session.all_logits().tobytes())
    assert logits[:2] == logits[2:]


class TestRefusals:
    @pytest.mark.parametrize("bias", [0.0, -0.5, 4.1, float("nan"), float("inf")])
    def test_values(self, model: Path, bias: float) -> None:
        with pytest.raises(RemoeError, match="route_bias must be a number above 0, at most 4"):
            self.load(model, CacheConfig("6s", route_bias=bias))

    def test_without_effect(self, model: Path) -> None:
        with pytest.raises(RemoeError, match="prefers experts in the cache, and there is no expert cache"):
            observe_and_raise(model, {"expert_cache.route_bias": 0.5})
        with pytest.raises(RemoeError, match="prefers experts in the cache, and there is no expert cache"):
            observe_and_raise(model, {"expert_cache.budget": "off", "expert_cache.route_bias": 0.5})
        with pytest.raises(RemoeError, match=r"route_keep has no effect without expert_cache\.route_bias"):
            self.load(model, CacheConfig("6s", route_keep=1))
        with pytest.raises(RemoeError, match="keeps 3 experts of the router has no effect where a token uses 3"):
            self.load(model, CacheConfig("6s", route_bias=0.5, route_keep=3))

    def test_prefetch(self, model: Path) -> None:
        with pytest.raises(RemoeError, match="use it without --expert-prefetch"):
            self.load(model, CacheConfig("6s", prefetch="router", route_bias=0.5))

    def test_groups_of_experts(self, tmp_path: Path) -> None:
        path = tiny(tmp_path, "deepseek2", selection_bias=True)
        groups: dict[str, str | int | float] = {
            "deepseek2.expert_group_count": 4,
            "deepseek2.expert_group_used_count": 2,
            "expert_cache.budget": "6s",
        }
        observe_routing(path, TOKENS[:1], 2, overrides=groups)
        with pytest.raises(RemoeError, match=r"its routers choose groups of experts first \(4 groups\)"):
            observe_and_raise(path, {**groups, "expert_cache.route_bias": 0.5})

    @staticmethod
    def load(path: Path, cache: CacheConfig) -> None:
        with load_model(path, cache):
            pass


def observe_and_raise(path: Path, overrides: dict[str, str | int | float]) -> None:
    try:
        observe_routing(path, TOKENS[:1], 2, overrides=overrides)
    except RuntimeError as error:
        raise RemoeError(str(error)) from error


class TestTold:
    def test_info(self, model: Path) -> None:
        with load_model(model, CacheConfig("6s")) as loaded:
            info = loaded.info()
            assert info is not None
            assert (info.route_bias, info.route_keep) == (None, None)
        with load_model(model, CacheConfig("6s", route_bias=0.1, route_keep=2)) as loaded:
            info = loaded.info()
            assert info is not None
            assert (info.route_bias, info.route_keep) == (0.1, 2)

    def test_tools_take_it_from_flags_only_and_warn(self, model: Path) -> None:
        cache = ("--expert-cache", "6s")
        plain = completion(model, *cache)
        env = completion(
            model,
            *cache,
            env={"LLAMA_ARG_EXPERT_ROUTE_BIAS": "4", "LLAMA_ARG_EXPERT_CACHE_ROUTE_BIAS": "4"},
        )
        biased = completion(model, *cache, "--expert-route-bias", "4", "--expert-route-keep", "0")
        assert plain.returncode == env.returncode == biased.returncode == 0, biased.stderr
        assert "ROUTE BIAS" not in plain.stderr + env.stderr
        assert (
            "ROUTE BIAS 4: tokens that come one at a time prefer experts in the cache, the router's first 0 stay"
            in (biased.stderr)
        )
        alone = completion(model, "--expert-route-bias", "0.5")
        assert alone.returncode != 0
        assert "have no effect without --expert-cache" in alone.stderr + alone.stdout
        bench = tool("llama-bench", "-m", model, *cache, "--expert-route-bias", "0.5")
        assert bench.returncode != 0, "its rows could not tell"

    def test_run_and_bench(self, model: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "remoe_edge"]
        arguments = ["-p", "w00001", "-n", "8", "-t", "1"]
        run = subprocess.run(
            [*command, "run", str(model), *arguments, "--expert-cache", "6s", "--route-bias", "0.5", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(run.stdout)["route_bias"] == 0.5
        assert "LOSSY: route bias 0.5 preferred experts in the cache, the router's first 1 stayed" in run.stderr
        rows = tmp_path / "rows.jsonl"
        bench = subprocess.run(
            [*command, "bench", str(model), *arguments, "-r", "1", "--budget", "6s", "--route-bias", "0.5", "-o", rows],
            capture_output=True,
            text=True,
            check=True,
        )
        own, biased = map(json.loads, rows.read_text().splitlines())
        assert (own["route_bias"], own["route_keep"]) == (None, None)
        assert (biased["route_bias"], biased["route_keep"]) == (0.5, 1)
        assert "route bias 0.5" in bench.stderr
        report = subprocess.run(
            [*command, "report", str(rows), "-o", str(tmp_path / "report.html")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert report.returncode == 0, report.stderr
        assert "Lossy, with other experts than the model" in (tmp_path / "report.html").read_text()
