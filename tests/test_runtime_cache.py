"""The expert cache in the compiled runtime: what it counts, what it refuses, what a lost file does to it."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from llama_tools import completion, tool
from tiny_models import DENSE_ARCHITECTURE, UNKNOWN_ARCHITECTURE, write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.runtime.llama import CacheConfig, RuntimeReadError, Session, load_model, open_model

pytestmark = pytest.mark.runtime

N_EXPERT, K, N_LAYER = 16, 2, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path, "qwen3moe", quant="Q4_0", n_expert=N_EXPERT, k=K, n_layer=N_LAYER, seed=1)
    return path


def load(path: Path, cache: CacheConfig) -> None:
    with load_model(path, cache):
        pass


def decode_all(session: Session, steps: list[list[int]]) -> None:
    for tokens in steps:
        session.decode(tokens)


class TestRefusals:
    def test_budget_below_the_floor(self, model: Path) -> None:
        with pytest.raises(RemoeError, match=r"1s .*below the floor.* 2s: 2 of the 16 experts of each of 3 layers"):
            load(model, CacheConfig("1s"))
        with pytest.raises(RemoeError, match=r"4096 .*below the floor of this model, [\d.]+ MiB") as refused:
            load(model, CacheConfig("4096"))
        named = re.search(r"floor of this model, ([\d.]+) MiB", str(refused.value))
        assert named
        load(model, CacheConfig(f"{named[1]}MiB"))
        with pytest.raises(RemoeError, match=f"below the floor of this model, {named[1]} MiB"):
            load(model, CacheConfig(f"{float(named[1]) - 0.1:.1f}MiB"))

    @pytest.mark.parametrize("budget", ["12Q", "-5", "0", "1.5s", "s", "", "nan", "1e99"])
    def test_budget_that_is_no_size(self, model: Path, budget: str) -> None:
        with pytest.raises(RemoeError, match="is not a size: use bytes as in 880MiB"):
            load(model, CacheConfig(budget))

    def test_unknown_policy_and_read_mode(self, model: Path) -> None:
        with pytest.raises(RemoeError, match="unknown expert cache policy 'fifo', use next-use, lfu or lru"):
            load(model, CacheConfig("8s", policy="fifo"))
        with pytest.raises(RemoeError, match="unknown expert cache read mode 'tape', use auto, direct or mmap"):
            load(model, CacheConfig("8s", io="tape"))
        with pytest.raises(RemoeError, match="unknown expert prefetch 'oracle', use auto, router or off"):
            load(model, CacheConfig("8s", prefetch="oracle"))

    def test_dense_model(self, tmp_path: Path) -> None:
        dense = tmp_path / "dense.gguf"
        write_tiny_model(dense, DENSE_ARCHITECTURE)
        with pytest.raises(RemoeError, match=r"needs a model with experts, and llama .* has none"):
            load(dense, CacheConfig("8s"))
        with load_model(dense) as model:
            assert model.info() is None

    def test_unknown_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "unknown.gguf"
        write_tiny_model(path, UNKNOWN_ARCHITECTURE)
        with pytest.raises(RemoeError, match="unknown model architecture"):
            load(path, CacheConfig("8s"))

    def test_flags_without_effect(self, model: Path) -> None:
        for flag in (
            ("--expert-cache-policy", "lru"),
            ("--expert-cache-io", "mmap"),
            ("--expert-cache-threads", "2"),
            ("--expert-cache-repack", "on"),
            ("--expert-prefetch", "router"),
        ):
            result = completion(model, *flag)
            assert result.returncode != 0
            assert "have no effect without --expert-cache" in result.stderr + result.stdout
        result = completion(model, "--expert-cache", "8s", "--load-mode", "mlock")
        assert result.returncode != 0
        assert "--load-mode mlock would lock what the expert cache wants to move" in result.stderr + result.stdout


class TestTools:
    def test_flags_and_environment_give_the_same_text(self, model: Path) -> None:
        plain = completion(model, "--no-repack")
        flags = completion(model, "--no-repack", "--expert-cache", "4s", "--expert-cache-policy", "lru")
        env = completion(
            model, "--no-repack", env={"LLAMA_ARG_EXPERT_CACHE": "4s", "LLAMA_ARG_EXPERT_CACHE_IO": "mmap"}
        )
        assert plain.returncode == flags.returncode == env.returncode == 0, plain.stderr
        assert plain.stdout == flags.stdout == env.stdout
        assert "expert cache" not in plain.stderr
        assert "4 slots of 16 experts in each of 3 layers" in flags.stderr
        assert "policy lru, direct reads" in flags.stderr
        assert "policy next-use, mmap reads" in env.stderr

    def test_the_argument_wins_over_the_environment(self, model: Path) -> None:
        result = completion(model, "--expert-cache", "5s", env={"LLAMA_ARG_EXPERT_CACHE": "4s"})
        assert "5 slots of 16 experts" in result.stderr

    def test_llama_bench_and_perplexity(self, model: Path, tmp_path: Path) -> None:
        bench = tool("llama-bench", "-m", model, "-p", 8, "-n", 4, "-r", 1, "-t", 1, "--expert-cache", "4s", "-v")
        assert bench.returncode == 0, bench.stderr
        assert "4 slots of 16 experts" in bench.stderr
        text = tmp_path / "text.txt"
        text.write_text("abcdefgh " * 400)
        plain, cached = (
            tool("llama-perplexity", "-m", model, "-f", text, "-c", 128, "--chunks", 2, "-t", 1, "--no-repack", *more)
            for more in ((), ("--expert-cache", "4s"))
        )
        assert cached.returncode == 0, cached.stderr
        final = [line.split("PPL")[1] for run in (plain, cached) for line in run.stderr.splitlines() if "Final" in line]
        assert len(final) == 2
        assert final[0] == final[1]

    def test_auto_prints_what_it_decided(self, model: Path) -> None:
        result = completion(model, "--expert-cache", "auto")
        assert result.returncode == 0
        assert "expert cache: auto chose" in result.stderr
        assert "16 slots of 16 experts" in result.stderr

    def test_trace_with_and_without_the_cache(self, model: Path, tmp_path: Path) -> None:
        traces = []
        for name, args in (("off", ()), ("on", ("--expert-cache", "3s"))):
            path = tmp_path / f"{name}.npz"
            result = completion(model, "--no-repack", "--expert-trace", path, *args)
            assert result.returncode == 0, result.stderr
            traces.append(path)
        assert traces[0].read_bytes() == traces[1].read_bytes()
        ids = np.load(traces[0])["ids"]
        assert ids.shape[1:] == (N_LAYER, K)
        computed = ids != 65535
        assert computed[-5:].all()
        assert (ids[computed] < N_EXPERT).all()
        assert set(tmp_path.iterdir()) == set(traces)


class TestFaults:
    @pytest.mark.parametrize("io", ["direct", "mmap"])
    @pytest.mark.parametrize("prefill", [False, True])
    def test_file_truncated_while_decoding(self, model: Path, tmp_path: Path, io: str, prefill: bool) -> None:
        path = tmp_path / "model.gguf"
        shutil.copy(model, path)
        prompt = list(range(10, 74))
        steps = [prompt] if prefill else [[token] for token in prompt]

        with open_model(path, CacheConfig("3s", io=io), n_threads=2, repack=False) as session:
            session.decode([7])
            first = session.logits()

            content = path.read_bytes()
            os.truncate(path, len(content) // 2)
            with pytest.raises(RuntimeReadError) as caught:
                decode_all(session, steps)
            message = str(caught.value)
            assert "status -3" in message
            assert str(path) in message
            assert "cannot read tensor blk." in message
            assert "expert " in message
            assert "offset " in message
            assert "the file ends after" in message
            # The process lives, and says the same as long as the fault is there.
            session.clear()
            with pytest.raises(RuntimeReadError, match="cannot read tensor"):
                decode_all(session, steps)

            with path.open("r+b") as file:
                file.write(content)
            session.clear()
            session.decode([7])
            assert session.logits().tobytes() == first.tobytes()
            decode_all(session, steps)
            after = session.logits()
        with open_model(path, n_threads=2, mmap=False, repack=False) as session:
            session.decode([7])
            decode_all(session, steps)
            assert session.logits().tobytes() == after.tobytes()

    def test_file_removed_while_decoding(self, model: Path, tmp_path: Path) -> None:
        """An open file stays readable without its name: nothing happens."""
        path = tmp_path / "model.gguf"
        shutil.copy(model, path)
        with open_model(path, CacheConfig("3s"), n_threads=1) as session:
            path.unlink()
            for token in range(10, 40):
                session.decode([token])
            assert np.isfinite(session.logits()).all()


class TestSharing:
    def test_two_contexts_on_one_model(self, model: Path) -> None:
        """Contexts take turns: interleaved they give what each gives alone."""
        alone = []
        for seed in (1, 2):
            tokens = np.random.default_rng(seed).integers(5, 60, 30).tolist()
            with open_model(model, CacheConfig("3s"), n_threads=1, repack=False) as session:
                rows = []
                for token in tokens:
                    session.decode([token])
                    rows.append(session.logits())
                alone.append((tokens, np.stack(rows)))
        with (
            load_model(model, CacheConfig("3s"), repack=False) as shared,
            shared.session(n_threads=1) as a,
            shared.session(n_threads=1) as b,
        ):
            rows_a, rows_b = [], []
            for token_a, token_b in zip(alone[0][0], alone[1][0], strict=True):
                a.decode([token_a])
                b.decode([token_b])
                rows_a.append(a.logits())
                rows_b.append(b.logits())
        assert np.stack(rows_a).tobytes() == alone[0][1].tobytes()
        assert np.stack(rows_b).tobytes() == alone[1][1].tobytes()

    def test_two_contexts_in_two_threads(self, model: Path) -> None:
        with load_model(model, CacheConfig("3s"), repack=False) as shared:

            def run(seed: int) -> bytes:
                with shared.session(n_threads=2) as session:
                    for token in np.random.default_rng(seed).integers(5, 60, 40).tolist():
                        session.decode([token])
                    return session.logits().tobytes()

            expected = [run(seed) for seed in range(3)]
            with ThreadPoolExecutor(3) as pool:
                assert list(pool.map(run, range(3))) == expected


class TestScore:
    def test_likelihoods_of_tokens_one_by_one(self, model: Path) -> None:
        tokens = np.random.default_rng(3).integers(5, 60, 25).tolist()
        with open_model(model, CacheConfig("3s"), n_ctx=32, n_threads=1, repack=False) as session:
            session.decode([7])
            session.reset_stats()
            losses = session.score(tokens)
            stats = session.stats()
            session.clear()
            session.decode(tokens[:10])
            row = session.logits().astype(np.float64)
            batched = session.score(tokens, batch=8)
            with pytest.raises(RemoeError, match="tokens do not fit into a context of"):
                session.score([5] * (session.n_ctx + 2))
        assert losses.shape == (24,)
        assert losses[9] == pytest.approx(np.log(np.exp(row).sum()) - row[tokens[10]], abs=1e-4)
        assert batched == pytest.approx(losses, abs=1e-3)
        assert stats is not None
        assert stats.calls == 24 * N_LAYER
        with open_model(model, n_ctx=32, n_threads=1, mmap=False, repack=False) as session:
            assert session.score(tokens).tobytes() == losses.tobytes()
