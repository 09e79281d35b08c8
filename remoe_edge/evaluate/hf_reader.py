"""Routers in a transformers model: one set of weights, into which each router is put in turn. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.reader import Floats, Ids, Noise, Pass, noise
from remoe_edge.gguf_io.router import gguf_router_name, read_router
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE, fresh_cache, record
from remoe_edge.tuning.data import load_sequences

RouterState = Mapping[str, Tensor]
"""Router tensors by their name in a checkpoint."""

_BATCH = 4
_TOKENS_AT_ONCE = 16_384
_LOGITS_AT_ONCE = 1 << 25
"""Logits held in FP32 for one router: a long text and a large vocabulary would need many gigabytes."""
_NOISE_ROWS = 4


@torch.no_grad()
def set_router(moe: MoE, router: RouterState) -> None:
    """Put router tensors into the model."""
    for name, parameter in moe.router_parameters().items():
        parameter.copy_(router[name])


def router_state(moe: MoE) -> dict[str, Tensor]:
    """A copy of the model's router tensors."""
    return {name: parameter.detach().clone() for name, parameter in moe.router_parameters().items()}


def router_from(moe: MoE, path: Path) -> dict[str, Tensor]:
    """The router in a safetensors file or a checkpoint folder, for this model.

    What it does not hold, such as a bias that is not trained, stays as the model has it. Raises RemoeError if it holds
    none, or one of another model.
    """
    stored = read_router(path).tensors
    own = {gguf_router_name(name): name for name in moe.router_parameters()}
    state = router_state(moe)
    for name, tensor in stored.items():
        if name not in own:
            if name.endswith("exp_probs_b.bias"):
                continue
            raise RemoeError(f"{path}: has the router {tensor.key}, for which this model has no layer")
        target = state[own[name]]
        if tensor.shape != tuple(target.shape):
            raise RemoeError(f"{path}: {tensor.key} is {list(tensor.shape)}, expected {list(target.shape)}")
        state[own[name]] = torch.from_numpy(tensor.load().copy()).to(target)
    if missing := [own[name] for name in own if name not in stored and str(name).endswith(".weight")]:
        raise RemoeError(f"{path}: has no tensor '{missing[0]}', which this model's router has")
    return state


class HfReader:
    """A `Reader` of a model that `remoe_edge.tuning.adapters.adapt` knows. `routers`: the base first."""

    def __init__(self, moe: MoE, tokenizer: Any, routers: Mapping[str, RouterState]) -> None:
        self.names = list(routers)
        self.kind = moe.model_type
        self.layers, self.experts, self.top_k = moe.layers, moe.experts, moe.top_k
        self._moe = moe
        self._tokenizer = tokenizer
        self._routers = routers

    def sequences(self, path: Path, length: int, report: Report = silent) -> Ids:
        return load_sequences([path], self._tokenizer, length, report=report).ids

    def text_bytes(self, rows: Ids) -> int:
        texts = self._tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in texts)

    @torch.no_grad()
    def read(self, rows: Ids, report: Report = silent) -> list[Pass]:
        batch = min(_BATCH, max(1, _TOKENS_AT_ONCE // rows.shape[1]))
        parts: list[list[Pass]] = [[] for _ in self.names]
        for start in range(0, len(rows), batch):
            ids = torch.from_numpy(rows[start : start + batch]).to(self._device)
            base = None
            for index, router in enumerate(self._routers.values()):
                report("reading", (start + len(ids) * index / len(self.names)) / len(rows))
                set_router(self._moe, router)
                hidden, ids_chosen, entropy = self._forward(ids[:, :-1])
                base = hidden if base is None else base
                nll, kl = self._losses(hidden, ids[:, 1:], base)
                parts[index].append(Pass(ids_chosen, nll, kl if index else None, entropy))
        return [_joined(own) for own in parts]

    @torch.no_grad()
    def write(self, prompts: Ids, tokens: int, report: Report = silent) -> list[Pass]:
        passes = []
        for index, router in enumerate(self._routers.values()):
            set_router(self._moe, router)
            ids = torch.from_numpy(prompts).to(self._device)
            chosen, entropies = [], []
            kept = fresh_cache(self._moe.model)
            out: Any = self._moe.model(input_ids=ids, **kept)
            for step in range(tokens):
                report("writing", (index + step / tokens) / len(self.names))
                token = out.logits[:, -1:].argmax(-1)
                with record(self._moe) as routings:
                    out = self._moe.model(input_ids=token, **kept)
                chosen.append(torch.stack([routing.ids for routing in routings], 1))
                entropies.append(torch.stack([_entropy(routing.probs).mean() for routing in routings]))
            passes.append(Pass(_experts(torch.stack(chosen, 1)), entropy=torch.stack(entropies).mean(0).cpu().numpy()))
        return passes

    @torch.no_grad()
    def noise(self, rows: Ids, report: Report = silent) -> list[Noise]:
        """Sequences one by one instead of together, and matrix products in BF16."""
        set_router(self._moe, self._routers[self.names[0]])
        ids = torch.from_numpy(rows[:_NOISE_ROWS]).to(self._device)
        first = self._forward(ids[:, :-1])
        base = Pass(first[1], self._losses(first[0], ids[:, 1:], first[0])[0])

        def again(inputs: Tensor, reference: Tensor) -> Pass:
            hidden, chosen, _ = self._forward(inputs[:, :-1])
            return Pass(chosen, *self._losses(hidden, inputs[:, 1:], reference))

        singles = []
        for row in range(len(ids)):
            report("noise floor", row / (2 * len(ids)))
            singles.append(again(ids[row : row + 1], first[0][row : row + 1]))
        report("noise floor", 0.5)
        found = [noise(f"sequences one by one instead of {len(ids)} together", base, _joined(singles))]
        with torch.autocast(self._device.type, torch.bfloat16):
            found.append(noise("matrix products in BF16", base, again(ids, first[0])))
        return found

    @contextmanager
    def router(self, name: str) -> Iterator[MoE]:
        """The model with one of the routers."""
        set_router(self._moe, self._routers[name])
        yield self._moe

    @property
    def _device(self) -> torch.device:
        return next(self._moe.model.parameters()).device

    def _forward(self, ids: Tensor) -> tuple[Tensor, Any, Floats]:
        """What the last layer gives, [rows, tokens, hidden]; the chosen experts; the routers' entropy by layer."""
        model: Any = self._moe.model
        with record(self._moe) as routings:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        chosen = torch.stack([routing.ids.view(*ids.shape, -1) for routing in routings], 2)
        entropy = torch.stack([_entropy(routing.probs).mean() for routing in routings])
        return hidden, _experts(chosen), entropy.cpu().numpy()

    def _losses(self, hidden: Tensor, targets: Tensor, base: Tensor) -> tuple[Floats, Floats]:
        """nll and KL(base || this), [rows, tokens] each."""
        model: Any = self._moe.model
        head = model.get_output_embeddings()
        step = max(1, _LOGITS_AT_ONCE // (len(targets) * model.config.vocab_size))
        nlls, kls = [], []
        for start in range(0, targets.shape[1], step):
            part = slice(start, start + step)
            logs = head(hidden[:, part]).float().log_softmax(-1)
            nlls.append(-logs.gather(-1, targets[:, part, None])[..., 0])
            if base is hidden:
                kls.append(torch.zeros_like(nlls[-1]))
            else:
                reference = head(base[:, part]).float().log_softmax(-1)
                kls.append((reference.exp() * (reference - logs)).sum(-1))
        nll, kl = (torch.cat(values, 1).cpu().numpy() for values in (nlls, kls))
        return nll, kl


def _experts(ids: Tensor) -> Any:
    return ids.cpu().numpy().astype(np.uint16)


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = -(probs * (probs + 1e-12).log()).sum(-1)
    return entropy / math.log(probs.shape[-1])


def _joined(parts: list[Pass]) -> Pass:
    """Rows of several passes of one router, one after the other."""

    def rows(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    entropies = [part.entropy for part in parts if part.entropy is not None]
    weights = [len(part.ids) for part in parts]
    entropy = np.average(entropies, axis=0, weights=weights) if len(entropies) == len(parts) else None
    return Pass(rows("ids"), rows("nll"), rows("kl"), entropy)
