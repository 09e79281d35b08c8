"""Train the demo model from scratch: a fine-grained MoE of 12 M parameters that llama.cpp runs (architecture olmoe).

    scripts/train_demo_model.py --text FOLDER --work FOLDER --steps 2600 --decay 900

Goes on from the last checkpoint in --work. The learning rate is constant and falls to zero over the last --decay steps,
so that a run can be made longer as long as it has not begun to decay. `--export FOLDER` writes the Hugging Face
checkpoint (BF16) and ends. Under `torchrun --nproc-per-node N` the processes share each batch: on a CPU, N processes of
one thread are faster than one of N. Needs the extra `tune`.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from demo_corpus import END, encode, learn_tokenizer, read_corpus
from muon import Muon
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
MIXTURE = {"stories": 0.56, "wiki": 0.19, "maths": 0.13, "code": 0.12}
"""Part of each batch, by domain."""
CONTEXT = 2048
LEARNING_RATE = 3e-3
WARM_UP = 50
BALANCE, Z_LOSS = 0.01, 0.001
"""Weights of the load-balancing loss and of the router's z-loss, as OLMoE's (arXiv 2409.02060, section 2)."""
SEED = 1


def config() -> OlmoeConfig:
    """8 layers of 32 experts, 4 of them per token."""
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=CONTEXT,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        router_aux_loss_coef=BALANCE,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        experts_implementation="grouped_mm",
    )


class Corpus:
    """Batches of token ids, a pure function of seed and step."""

    def __init__(self, text: Path, work: Path) -> None:
        folder = work / "tokens"
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            domains = read_corpus(text)
            tokenizer = learn_tokenizer(domains, VOCABULARY)
            tokenizer.save(str(folder / "tokenizer.json"))
            for name, domain in domains.items():
                np.save(folder / f"{name}.train.npy", encode(tokenizer, domain.train, SEED))
                np.save(folder / f"{name}.held_out.npy", encode(tokenizer, domain.held_out))
                (folder / f"{name}.held_out.txt").write_text("\n\n".join(domain.held_out), encoding="utf-8")
                (folder / f"{name}.train.txt").write_text("\n\n".join(domain.train), encoding="utf-8")
            (folder / "done").touch()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.train = {name: np.load(folder / f"{name}.train.npy") for name in MIXTURE}
        self.held_out = {name: np.load(folder / f"{name}.held_out.npy") for name in MIXTURE}

    def batch(self, seen: dict[str, int], tokens: int, length: int) -> torch.Tensor:
        """[tokens / length, length + 1]; `seen` counts the tokens taken of each domain and moves on."""
        rows = []
        left = tokens // length
        for name, part in MIXTURE.items():
            count = left if name == list(MIXTURE)[-1] else min(left, round(tokens // length * part))
            left -= count
            data = self.train[name]
            blocks = (len(data) - 1) // length
            for _ in range(count):
                epoch, block = divmod(seen[name] // length, blocks)
                order = np.random.default_rng([SEED, epoch, length]).permutation(blocks)
                start = int(order[block]) * length
                rows.append(data[start : start + length + 1])
                seen[name] += length
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def losses(model: OlmoeForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Cross entropy, load-balancing loss and z-loss of a batch [rows, length + 1], and its reuse rate."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        logits = model.lm_head(out.last_hidden_state)
    entropy = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    balance, z, reuse = torch.zeros(()), torch.zeros(()), 0.0
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    for router in out.router_logits:
        router = router.float()
        probs = router.softmax(-1)
        with torch.no_grad():
            chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, -1).indices, 1.0)
            rows = chosen.view(len(batch), -1, experts)
            reuse += float((rows[:, 1:] * rows[:, :-1]).sum(-1).mean()) / top_k / len(out.router_logits)
        balance = balance + experts * (chosen.mean(0) / top_k * probs.mean(0)).sum() / len(out.router_logits)
        z = z + router.logsumexp(-1).square().mean() / len(out.router_logits)
    return entropy, balance, z, reuse


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, corpus: Corpus, length: int, rows: int = 16) -> dict[str, float]:
    """Bits per byte on the start of each held-out part."""
    result = {}
    for name, data in corpus.held_out.items():
        count = min(rows, (len(data) - 1) // length)
        batch = torch.from_numpy(
            np.stack([data[i * length : (i + 1) * length + 1] for i in range(count)]).astype(np.int64)
        )
        entropy = losses(model, batch)[0].item()
        size = len(corpus.tokenizer.decode(batch[:, 1:].flatten().tolist(), skip_special_tokens=False).encode())
        result[name] = entropy * batch[:, 1:].numel() / math.log(2) / size
    return result


def optimizers(model: OlmoeForCausalLM) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim >= 2 and "layers" in n and ".gate.weight" not in n]
    rest = [p for n, p in model.named_parameters() if not any(p is q for q in hidden)]
    return [
        Muon(hidden, LEARNING_RATE),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def save(work: Path, model: OlmoeForCausalLM, optims: list[torch.optim.Optimizer], state: dict) -> None:
    """Checkpoint: weights, optimiser states and counters, each file whole."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optim in enumerate(optims):
        for j, values in optim.state_dict()["state"].items():
            tensors |= {f"optim.{i}.{j}.{key}": torch.as_tensor(value).contiguous() for key, value in values.items()}
    save_file(tensors, work / "checkpoint.tmp", {"state": json.dumps(state)})
    os.replace(work / "checkpoint.tmp", work / "checkpoint.safetensors")


def restore(work: Path, model: OlmoeForCausalLM, optims: list[torch.optim.Optimizer]) -> dict:
    """Load the last checkpoint; its counters."""
    from safetensors import safe_open

    path = work / "checkpoint.safetensors"
    tensors = load_file(path)
    model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    for i, optim in enumerate(optims):
        state = optim.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optim.{i}."):
                j, key = name.split(".")[2:]
                state["state"].setdefault(int(j), {})[key] = tensor
        optim.load_state_dict(state)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


def export(model: OlmoeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """The Hugging Face checkpoint, BF16."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT)
    clone = OlmoeForCausalLM(config())
    clone.load_state_dict(model.state_dict())
    clone.bfloat16().save_pretrained(folder)
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the source texts")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoint, tokens and log")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--decay", type=int, default=900, help="last steps, in which the learning rate falls to zero")
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--long-after", type=int, default=None, help="step after which sequences are 512 tokens")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--export", type=Path, help="write the checkpoint here, as it is, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    rank, size = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.text, args.work)
    model = OlmoeForCausalLM(config())
    optims = optimizers(model)
    state = {"step": 0, "seen": dict.fromkeys(MIXTURE, 0)}
    if (args.work / "checkpoint.safetensors").exists():
        state = restore(args.work, model, optims)
    if args.export:
        export(model, corpus.tokenizer, args.export)
        return
    if rank == 0:
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {state['step']}",
            flush=True,
        )
    with open(args.work / "log.jsonl", "a", encoding="utf-8") as log:
        for step in range(state["step"], args.steps):
            start = time.monotonic()
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, (args.steps - step) / args.decay)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate
            length = 512 if args.long_after is not None and step >= args.long_after else args.length
            batch = corpus.batch(state["seen"], args.batch, length)
            # Every process sees every domain.
            entropy, balance, z, reuse = losses(model, batch[rank::size])
            (entropy + BALANCE * balance + Z_LOSS * z).backward()
            parts = torch.tensor([float(entropy), float(balance), float(z), reuse])
            if size > 1:
                flat = torch.cat([parts, *(p.grad.flatten() for p in model.parameters())])
                dist.all_reduce(flat)
                flat /= size
                parts, *grads = flat.split([len(parts), *(p.numel() for p in model.parameters())])
                for param, grad in zip(model.parameters(), grads, strict=True):
                    param.grad = grad.view_as(param)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            state["step"] = step + 1
            row = {
                "step": step + 1,
                "tokens": sum(state["seen"].values()),
                "loss": round(float(parts[0]), 4),
                "balance": round(float(parts[1]), 4),
                "z": round(float(parts[2]), 4),
                "reuse_rate": round(float(parts[3]), 4),
                "grad_norm": round(norm, 3),
                "lr": rate,
                "seconds": round(time.monotonic() - start, 2),
            }
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                row["bits_per_byte"] = evaluate(model, corpus, length)
                if rank == 0:
                    save(args.work, model, optims, state)
            if rank > 0:
                continue
            log.write(json.dumps(row) + "\n")
            log.flush()
            if (step + 1) % 10 == 0:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
