"""`remoe_edge.Llama`: llama-cpp-python's class on the expert cache."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_twin import LAYERS, TOP_K, write_small_twin
from tiny_models import DENSE_ARCHITECTURE, write_tiny_model

from remoe_edge.errors import RemoeError
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import Model, RuntimeReadError

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, remoe_edge; assert not {'llama_cpp', 'numpy', 'click'} & set(sys.modules); remoe_edge.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'remoe_edge' has no attribute 'nothing'" in result.stderr


def test_without_the_runtime_it_says_what_to_do() -> None:
    code = """
import sys
sys.modules["llama_cpp"] = None
try:
    from remoe_edge import Llama
except Exception as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("RemoeError the runtime is not installed")
    assert result.stdout.endswith("run `remoe-edge build`\n")


@pytest.fixture(scope="module")
def runtime() -> None:
    ensure_runtime()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("api") / "tiny.gguf", "olmoe")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("api") / "twin.gguf")


def llama(path: Path, **options: Any) -> Any:
    from remoe_edge import Llama

    return Llama(str(path), **{"n_ctx": 256, "n_threads": 1, "verbose": False, **options})


needs_runtime = [pytest.mark.runtime, pytest.mark.usefixtures("runtime")]


class TestWithRuntime:
    pytestmark = needs_runtime

    def test_the_cache_changes_nothing_but_memory(self, model: Path) -> None:
        scores = {}
        for cache in "off", "4s", "auto":
            with llama(model, expert_cache=cache, logits_all=True) as llm:
                llm.eval(llm.tokenize(b"w00000w00001w00002w00003w00004"))
                for token in range(280, 290):
                    llm.eval([token])
                scores[cache] = llm.scores[: llm.n_tokens].tobytes()
                stats, info = llm.cache_stats(), llm.cache_info()
                if cache == "off":
                    assert stats is info is None
                else:
                    assert stats.hits + stats.misses > 0
                    assert info.n_layers == 3
                if cache == "4s":
                    assert stats.evictions > 0
                    assert info.n_slots == 4
                    assert sum(llm.cache_stats(layer).hits for layer in range(3)) == stats.hits
                    llm.reset_cache_stats()
                    assert llm.cache_stats().hits == 0
        assert len(set(scores.values())) == 1

    def test_completions_chat_and_streams(self, twin: Path) -> None:
        with llama(twin, expert_cache="4s", expert_cache_policy="lru", expert_cache_io="mmap") as llm:
            whole = llm("w00000", max_tokens=4, temperature=0)["choices"][0]["text"]
            assert whole == "w00001w00002w00003w00004"
            parts = llm.create_completion("w00000", max_tokens=4, temperature=0, stream=True)
            assert "".join(part["choices"][0]["text"] for part in parts) == whole
            chat = llm.create_chat_completion([{"role": "user", "content": "w00000"}], max_tokens=2, temperature=0)
            assert chat["choices"][0]["message"]["role"] == "assistant"
            assert (llm.cache_info().policy, llm.cache_info().io) == ("lru", "mmap")

    def test_overrides_of_the_caller_are_kept(self, model: Path) -> None:
        mine = {"general.name": "mine", "expert_cache.budget": "5s", "olmoe.attention.layer_norm_rms_epsilon": 0.5}
        with llama(model, kv_overrides=mine, expert_cache_threads=2, logits_all=True) as llm:
            assert (llm.cache_info().n_slots, llm.cache_info().n_threads) == (5, 2)
            llm.eval([280, 281])
            changed = llm.scores[:2].copy()
        with llama(model, logits_all=True) as llm:
            llm.eval([280, 281])
            assert not np.array_equal(llm.scores[:2], changed)
        with pytest.raises(RemoeError, match=r"expert_cache\.budget is given twice"):
            llama(model, kv_overrides=mine, expert_cache="4s")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"expert_cache": "1s"}, f"below the floor.*{TOP_K}s"),
            ({"expert_cache": 4096}, "below the floor"),
            ({"expert_cache": "4s", "expert_cache_policy": "best"}, "unknown expert cache policy 'best'"),
            ({"expert_cache": "off", "expert_cache_io": "mmap"}, r"expert_cache\.io has no effect"),
            ({"use_mlock": True}, "mlock"),
        ],
    )
    def test_what_cannot_work_is_refused_with_the_reason(
        self, twin: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RemoeError, match=message):
            llama(twin, **options)

    def test_no_model_is_the_error_of_both_libraries(self, tmp_path: Path) -> None:
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
        for name in "bad.gguf", "missing.gguf":
            for kind in RemoeError, ValueError:
                with pytest.raises(kind, match=re.escape(name)):
                    llama(tmp_path / name, expert_cache="4s")

    def test_dense_models_have_no_cache(self, tmp_path: Path) -> None:
        with llama(write_tiny_model(tmp_path / "dense.gguf", DENSE_ARCHITECTURE)) as llm:
            assert llm.cache_info() is None
            assert llm("w00000", max_tokens=2)["usage"]["completion_tokens"] > 0

    def test_libraries_that_import_llama_cpp_themselves_get_the_cache_by_overrides(self, twin: Path) -> None:
        from llama_cpp import Llama

        # As langchain_community's ChatLlamaCpp calls it, with what it takes as model_kwargs.
        overrides = {"expert_cache.budget": "4s"}
        llm = Llama(str(twin), n_ctx=256, n_parts=-1, f16_kv=True, verbose=False, kv_overrides=overrides)
        info = Model(twin, llm._model.model, repack=True).info()
        assert info is not None
        assert info.n_slots == 4
        assert llm("w00000", max_tokens=2, temperature=0)["choices"][0]["text"] == "w00001w00002"
        llm.close()

    def test_embeddings_are_the_same(self, model: Path) -> None:
        vectors = []
        for cache in "off", "4s":
            with llama(model, expert_cache=cache, embedding=True, pooling_type=1) as llm:
                vectors.append([llm.embed("w00001w00002"), llm.create_embedding("w00003")["data"][0]["embedding"]])
        assert vectors[0] == vectors[1]

    def test_speculative_decoding_is_the_same(self, twin: Path) -> None:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        texts = []
        for cache in "off", "8s":
            draft = LlamaPromptLookupDecoding(num_pred_tokens=2)
            with llama(twin, expert_cache=cache, draft_model=draft) as llm:
                texts.append(llm("w00000w00001w00000", max_tokens=6, temperature=0)["choices"][0]["text"])
        assert texts[0] == texts[1] == "w00001w00002w00003w00004w00005w00006"

    def test_two_at_once_and_closing_frees(self, twin: Path) -> None:
        one, two = llama(twin, expert_cache="4s"), llama(twin, expert_cache="8s")
        assert one("w00000", max_tokens=2, temperature=0)["choices"][0]["text"] == "w00001w00002"
        assert two.cache_stats().hits + two.cache_stats().misses == 0
        one.close()
        one.close()
        assert two("w00000", max_tokens=2, temperature=0)["choices"][0]["text"] == "w00001w00002"
        two.close()
        assert str(twin) not in Path("/proc/self/maps").read_text()
        assert str(twin) not in [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        for use in two.cache_stats, two.cache_info, lambda: two("w00000"):
            with pytest.raises(RemoeError, match="is closed"):
                use()

    def test_a_copy_has_the_same_cache(self, twin: Path) -> None:
        for cache, slots in ("off", None), ("4s", 4):
            with llama(twin, expert_cache=cache) as llm:
                content = pickle.dumps(llm)
            with pickle.loads(content) as copy:
                assert (copy.cache_info().n_slots if slots else copy.cache_info()) == slots

    def test_a_failed_read_names_its_place_and_the_next_call_works(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        content = model.read_bytes()
        path.write_bytes(content)
        with llama(path, expert_cache="4s", expert_cache_io="direct", logits_all=True) as llm:
            os.truncate(path, len(content) // 2)
            with pytest.raises(RuntimeReadError, match=r"returned -3: .*model\.gguf.*expert \d+.*offset \d+"):
                llm.eval(list(range(270, 300)))
            path.write_bytes(content)
            llm.reset()
            llm.eval(list(range(270, 300)))
            scores = llm.scores[: llm.n_tokens].copy()
        with llama(model, expert_cache="off", logits_all=True) as llm:
            llm.eval(list(range(270, 300)))
            assert np.array_equal(llm.scores[: llm.n_tokens], scores)

    def test_examples_of_the_documentation_run(self, twin: Path, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").symlink_to(twin)
        text = (ROOT / "docs" / "python.md").read_text()
        examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert len(examples) >= 3
        for code in examples:
            result = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, code + result.stderr
        assert LAYERS == 3
