"""Routing traces of Hugging Face models, against what the model's routers really return."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_hf import ARCHITECTURES, EXPERTS, LAYERS, TOP_K, tiny_model  # noqa: E402

from remoe_edge.errors import RemoeError  # noqa: E402
from remoe_edge.routing.trace import load_trace, save_trace  # noqa: E402
from remoe_edge.tuning.adapters import adapt  # noqa: E402
from remoe_edge.tuning.export import write_router  # noqa: E402
from remoe_edge.tuning.hf_trace import trace_hf  # noqa: E402
from remoe_edge.tuning.load import load_model, load_tokenizer  # noqa: E402

TEXTS = ["The router chooses experts.", "Neighbouring tokens reuse the same experts, or not."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model("olmoe", tmp_path_factory.mktemp("olmoe")))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trace_is_what_the_routers_returned(arch: str, tmp_path: Path) -> None:
    model = str(tiny_model(arch, tmp_path / "model"))
    trace = trace_hf(model, TEXTS, probs=True)
    lengths = [len(ids) for ids in load_tokenizer(model)(TEXTS)["input_ids"]]
    assert trace.offs.tolist() == [0, lengths[0], sum(lengths)]
    assert trace.ids.shape == (sum(lengths), LAYERS, TOP_K)
    assert (trace.experts, trace.meta["phase"]) == (EXPERTS, "teacher-forced")
    # The model alone, with transformers' own hooks.
    seen: list[Any] = []
    plain = load_model(model)
    for name, module in plain.named_modules():
        if name.endswith((".gate", ".router")):
            module.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        plain(input_ids=torch.tensor([load_tokenizer(model)(TEXTS[1])["input_ids"]]))
    for layer, (_, weights, ids) in enumerate(seen):
        ranked = ids.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))
        assert np.array_equal(trace.ids[lengths[0] :, layer], ranked.numpy())
    assert trace.probs is not None
    assert (trace.probs > 0).all()
    assert (trace.probs.sum(-1) <= 1 + 1e-5).all()
    save_trace(trace, tmp_path / "trace.npz")
    assert load_trace(tmp_path / "trace.npz").digest() == trace.digest()


def test_own_output_is_greedy(folder: str) -> None:
    trace = trace_hf(folder, [TEXTS[0]], generate=6)
    assert trace.meta["phase"] == "decode"
    assert trace.probs is None
    ids = load_tokenizer(folder)(TEXTS[0])["input_ids"]
    model = load_model(folder)
    whole = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
    # What was written, read as a text: the same tokens, the same experts.
    read = trace_hf(folder, [whole])
    assert trace.tokens == len(whole) - len(ids)
    assert np.array_equal(trace.ids, read.ids[len(ids) :])


def test_another_router_routes_otherwise(folder: str, tmp_path: Path) -> None:
    router = {n: torch.randn_like(p) for n, p in adapt(load_model(folder)).router_parameters().items()}
    write_router(router, {}, tmp_path / "router.safetensors")
    base = trace_hf(folder, [[5, 6, 7, 8, 9, 10]])
    changed = trace_hf(folder, [[5, 6, 7, 8, 9, 10]], router=tmp_path / "router.safetensors")
    assert changed.digest() != base.digest()
    assert changed.meta["router"] == str(tmp_path / "router.safetensors")


def test_long_texts_are_cut(folder: str) -> None:
    assert trace_hf(folder, [TEXTS[0], [5] * 9], length=4).offs.tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text"),
        ([""], "text 1 of 1 has no tokens"),
        ([[3], [3, 99999]], "text 2 of 2: token 99999"),
        ([[-1]], "-1"),
    ],
)
def test_bad_texts_are_named(folder: str, texts: Any, message: str) -> None:
    with pytest.raises(RemoeError, match=message):
        trace_hf(folder, texts)
