"""Bring a trained demo model into the package: checkpoint, texts, loss curve and model card.

    scripts/package_demo_model.py --text FOLDER --work FOLDER --command "train_demo_model.py ..." [-o DIR]

Run after train_demo_model.py. Measures what the card says: bits per byte on held-out text beside an n-gram model on the
same tokens, reuse rate, and how far experts specialise. Routers come from `remoe-edge tune`, not from here.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from demo_corpus import EVALUATION_BYTES, read_corpus, read_unseen
from ngram_baseline import ORDER, KneserNey
from train_demo_model import MIXTURE, Corpus, config, export, restore
from transformers import OlmoeForCausalLM

LENGTH = 512
SOURCES = {
    "stories": ("sampled by this project's authors from stories15M (karpathy/llama2.c)", "MIT"),
    "wiki": ("English Wikipedia, from enwik8", "CC BY-SA 3.0"),
    "maths": ("openai/grade-school-math, train split", "MIT"),
    "code": ("teknium1/GPTeacher, codegen", "MIT"),
    "shakespeare": ("tinyshakespeare; never trained on", "public domain"),
}

Ids = npt.NDArray[np.int64]


@torch.no_grad()
def measure(model: OlmoeForCausalLM, corpus: Corpus, name: str, rows: int = 64) -> tuple[dict[str, float], Ids]:
    """Bits per byte, perplexity and reuse rate on a held-out part; the experts chosen [tokens, layers, k]."""
    data = corpus.held_out[name]
    count = min(rows, (len(data) - 1) // LENGTH)
    batch = torch.from_numpy(np.stack([data[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]).astype(np.int64))
    entropy, chosen = 0.0, []
    for part in batch.split(8):
        out = model(input_ids=part[:, :-1], output_router_logits=True, use_cache=False)
        entropy += float(
            torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
        top = [r.topk(model.config.num_experts_per_tok, -1).indices for r in out.router_logits]
        chosen.append(torch.stack(top, 1).view(len(part), LENGTH, len(top), -1))
    ids = torch.cat(chosen).numpy()
    shared = (ids[:, 1:, :, :, None] == ids[:, :-1, :, None, :]).any(-1).mean()
    size = len(corpus.tokenizer.decode(batch[:, 1:].flatten().tolist(), skip_special_tokens=False).encode())
    tokens = batch[:, 1:].numel()
    row = {
        "tokens": tokens,
        "bits_per_byte": entropy / math.log(2) / size,
        "ppl": math.exp(entropy / tokens),
        "reuse_rate": float(shared),
    }
    return row, ids.reshape(-1, *ids.shape[2:])


def specialisation(ids: dict[str, Ids], experts: int) -> dict[str, list[float]]:
    """By layer: bits that an expert tells about the domain of its token, and what chance gives with as many tokens."""
    tokens = min(map(len, ids.values()))
    rng = np.random.default_rng(0)
    result: dict[str, list[float]] = {"bits": [], "chance_bits": []}
    for layer in range(next(iter(ids.values())).shape[1]):
        used = np.concatenate([part[:tokens, layer] for part in ids.values()])
        domain = np.repeat(np.arange(len(ids)), tokens)
        for name, labels in ("bits", domain), ("chance_bits", rng.permutation(domain)):
            joint = np.zeros((len(ids), experts))
            np.add.at(joint, (labels[:, None], used), 1)
            joint /= joint.sum()
            independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
            known = joint > 0
            result[name].append(float((joint[known] * np.log2(joint[known] / independent[known])).sum()))
    return result


def draw_loss(log: list[dict[str, Any]], output: Path) -> None:
    """Loss on training batches, and bits per byte on held-out text."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in log]
    left.plot(tokens, [row["loss"] for row in log], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="cross entropy, nats per token", ylim=(1, 5))
    seen = [row for row in log if "bits_per_byte" in row]
    for name in MIXTURE:
        values = [row["bits_per_byte"][name] for row in seen]
        right.plot([row["tokens"] / 1e6 for row in seen], values, label=name)
    right.set(xlabel="million tokens", ylabel="bits per byte, held out")
    right.legend(frameon=False)
    figure.savefig(output, dpi=110)


def ngram_bits(corpus: Corpus, work: Path) -> dict[str, float]:
    """Bits per byte of the n-gram model by domain."""
    train = np.concatenate([corpus.train[name] for name in sorted(corpus.train)])
    model = KneserNey(train, int(train.max()) + 1)
    bits = {}
    for name, data in corpus.held_out.items():
        size = len((work / "tokens" / f"{name}.held_out.txt").read_bytes())
        bits[name] = float(-np.log2(model.probabilities(data)).sum() / size)
    return bits


def write_texts(text: Path, output: Path) -> None:
    """Held-out text by domain, and other text that the model has not seen to tune routers on."""
    domains = read_corpus(text)
    (output / "held-out").mkdir(exist_ok=True)
    for name, size in EVALUATION_BYTES.items():
        (output / "held-out" / f"{name}.txt").write_text(_join(domains[name].held_out, size), encoding="utf-8")
    play = (text / "tinyshakespeare.txt").read_text(encoding="utf-8")[:120_000]
    (output / "held-out" / "shakespeare.txt").write_text(play, encoding="utf-8")
    with gzip.GzipFile(output / "tune.jsonl.gz", "wb", 9, mtime=0) as file:
        unseen = read_unseen(text)
        taken = [{"text": document, "domain": name} for name, documents in unseen.items() for document in documents]
        # Rows of a file are cut across documents: neighbours are to be of different domains.
        random.Random(0).shuffle(taken)
        file.writelines(json.dumps(item).encode() + b"\n" for item in taken)


def _take(documents: list[str], size: int) -> list[str]:
    taken = []
    for document in documents:
        size -= len(document.encode())
        if size < 0:
            break
        taken.append(document)
    return taken


def _join(documents: list[str], size: int) -> str:
    return "\n\n".join(_take(documents, size)) + "\n"


def model_card(card: dict[str, Any]) -> str:
    """The README of the data folder."""
    ngram = card[f"ngram_{ORDER}_bits_per_byte"]
    rows = "\n".join(
        f"| {name} | {row['bits_per_byte']:.3f} | {ngram[name]:.3f} | {row['ppl']:.2f} | {row['reuse_rate']:.1%} |"
        for name, row in card["held_out"].items()
    )
    bits = card["specialisation"]
    sources = "\n".join(f"| {n} | {s['source']} | {s['licence']} |" for n, s in card["sources"].items())
    return f"""# The demo model

A fine-grained Mixture-of-Experts language model of {card["parameters"] / 1e6:.1f} M parameters,
trained from scratch on a CPU: architecture olmoe, hidden size 192, 8 layers of 32 experts (size 64), 4 of them per
token, vocabulary 4096 (its own byte-level BPE), context 2048, trained on sequences of 256 and at the end 512 tokens. It
writes simple stories, and something like encyclopedia articles, sums and programs; it knows nothing and is for showing
and testing this project.

| file | what |
|---|---|
| `model/` | Hugging Face checkpoint, BF16; sha256 in `card.json` |
| `router-seed0.safetensors`, `-seed1`, `-seed2` | made by `remoe-edge tune`; settings and figures in their metadata |
| `held-out/` | text that neither model nor router was trained on, by domain |
| `tune.jsonl.gz` | text that the routers were tuned on: neither the model's training text nor held-out text |
| `card.json`, `loss.jsonl`, `loss.png` | all figures, the training log, its picture |

Trained on {card["tokens"] / 1e6:.1f} M tokens in {card["steps"]} steps of 8192, seed 1, Muon and AdamW,
with load-balancing loss 0.01 and router z-loss 0.001:

    {card["command"]}
    scripts/package_demo_model.py --text TEXT --work WORK

On held-out text, beside an interpolated modified Kneser-Ney model of order {ORDER} on the same tokens
(`scripts/ngram_baseline.py`); reuse rate: experts that the token before chose, too (chance:
{card["chance_reuse_rate"]:.1%}):

| domain | bits per byte | n-gram | PPL per token | reuse rate |
|---|---|---|---|---|
{rows}

Experts specialise: one use of an expert tells {min(bits["bits"]):.2f} to {max(bits["bits"]):.2f} bits
about the domain of its token, by layer, of 2 possible; labels drawn at random give {max(bits["chance_bits"]):.4f}.

![loss](loss.png)

| text | source | licence |
|---|---|---|
{sources}

Weights and routers: MIT. The held-out and tuning texts keep the licences of their sources; Wikipedia text is CC BY-SA.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--command", required=True, help="how it was trained, for the card")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "remoe_edge" / "data" / "demo")
    args = parser.parse_args()
    torch.set_num_threads(2)
    corpus = Corpus(args.text, args.work)
    model = OlmoeForCausalLM(config())
    state = restore(args.work, model, [])
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    export(model, corpus.tokenizer, args.output / "model")
    write_texts(args.text, args.output)
    # What is shipped is measured: BF16 weights.
    model = OlmoeForCausalLM.from_pretrained(args.output / "model", dtype=torch.float32).eval()
    log = [json.loads(line) for line in (args.work / "log.jsonl").read_text().splitlines()]
    draw_loss(log, args.output / "loss.png")
    rows, chosen = {}, {}
    for name in MIXTURE:
        rows[name], chosen[name] = measure(model, corpus, name)
    card = {
        "command": args.command,
        "steps": state["step"],
        "tokens": sum(state["seen"].values()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": rows,
        f"ngram_{ORDER}_bits_per_byte": ngram_bits(corpus, args.work),
        "specialisation": specialisation(chosen, model.config.num_experts),
        "chance_reuse_rate": model.config.num_experts_per_tok / model.config.num_experts,
        "sha256": {
            str(path.relative_to(args.output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((args.output / "model").iterdir())
        },
        "sources": {name: {"source": source, "licence": licence} for name, (source, licence) in SOURCES.items()},
    }
    (args.output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (args.output / "README.md").write_text(model_card(card), encoding="utf-8")
    keep = ("step", "tokens", "loss", "balance", "reuse_rate", "lr", "bits_per_byte")
    lines = [json.dumps({k: row[k] for k in keep if k in row}) for row in log if row["step"] % 10 == 0]
    (args.output / "loss.jsonl").write_text("\n".join(lines) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
