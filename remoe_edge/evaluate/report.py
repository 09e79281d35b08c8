"""An evaluation as Markdown, and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASE, TUNED = "#8a8f98", "#2f6fde"


def markdown(result: Mapping[str, Any], title: str) -> str:
    """The whole report as text with tables."""
    lines = [f"# {title}", ""]
    lines += [f"- {verdict['text']}" for verdict in result["verdicts"]]
    lines += [
        "",
        f"{result['model_type']}, {result['layers']} MoE layers, top {result['top_k']} of {result['experts']} experts; "
        f"chance would reuse {result['chance_reuse_rate']:.1%}. Reuse rate (EOR) = mean over layers and steps of "
        "|E(t) and E(t-1)| / K within sequences. LRU: event-atomic, cold at each sequence. Reading: teacher-forced "
        "held-out text. Writing: the model's own greedy output. Intervals: 95 % bootstrap over sequences, paired.",
        "",
        "## All texts",
        "",
        *_table(
            ["router", "reuse", "change", "PPL", "change", "KL, nats", "misses C=K", "1/8", "1/4", "3/8", "1/2"],
            [_total(row) for row in _rows(result, text="all")],
        ),
        "",
        "## By text",
        "",
        *_table(
            [
                "text",
                "router",
                "reuse base",
                "tuned",
                "change [95 %]",
                "PPL base",
                "tuned",
                "change [95 %]",
                "misses C=K",
            ],
            [_text(row) for row in _rows(result, multiple=1, phase="reading") if row["text"] != "all"],
        ),
    ]
    written = _rows(result, phase="writing")
    if written:
        lines += ["", "## The model's own output", ""]
        lines += _table(
            ["text", "router", "reuse base", "tuned", "change [95 %]", "misses C=K", "1/4", "1/2"],
            [
                [
                    row["text"],
                    row["router"],
                    f"{row['reuse_rate_base']:.1%}",
                    f"{row['reuse_rate_tuned']:.1%}",
                    _change(row["reuse_rate_change"], row["reuse_rate_change_ci95"]),
                    *(f"{row['lru_miss_change'][key]:+.1%}" for key in ("C=K", "1/4", "1/2")),
                ]
                for row in written
            ],
        )
    longer = [row for row in result["rows"] if "ppl_base_beyond" in row]
    if longer:
        lines += ["", f"## Beyond the training length of {result['length']} tokens", ""]
        lines += _table(
            ["text", "length", "router", "PPL base beyond", "tuned", "change", "change inside", "reuse change beyond"],
            [_longer(row) for row in longer],
        )
    lines += ["", "## Collapse check", ""]
    lines += _table(
        ["router", "load CV", "load entropy", "routing entropy", "distinct experts"],
        [
            [row["router"], *(f"{row[f'{key}_base']:.4g} → {row[f'{key}_tuned']:.4g}" for key in _COLLAPSE)]
            for row in _rows(result, text="all")
        ],
    )
    if result.get("tasks"):
        lines += ["", "## Tasks", ""]
        lines += _table(
            ["task", "router", "items", "base", "tuned", "base only", "tuned only", "McNemar p"],
            [
                [
                    *(str(t[key]) for key in ("task", "router", "items")),
                    *(f"{t[key]:.1%}" for key in ("base", "tuned")),
                    *(str(t[key]) for key in ("base_only", "tuned_only")),
                    f"{t['p_value']:.3f}",
                ]
                for t in result["tasks"]
            ],
        )
    return "\n".join(lines) + "\n"


_COLLAPSE = ("load_cv", "load_entropy", "routing_entropy", "distinct_experts")


def _rows(result: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def _total(row: Mapping[str, Any]) -> list[str]:
    return [
        row["router"],
        f"{row['reuse_rate_base']:.1%} → {row['reuse_rate_tuned']:.1%}",
        f"{row['reuse_rate_change']:+.1%}",
        f"{row['ppl_base']:.3f} → {row['ppl_tuned']:.3f}",
        _change(row["ppl_change"], row["ppl_delta_ci95"]),
        f"{row['kl_mean']:.4f}",
        *(f"{row['lru_miss_change'][key]:+.1%}" for key in ("C=K", "1/8", "1/4", "3/8", "1/2")),
    ]


def _text(row: Mapping[str, Any]) -> list[str]:
    return [
        row["text"],
        row["router"],
        f"{row['reuse_rate_base']:.1%}",
        f"{row['reuse_rate_tuned']:.1%}",
        _change(row["reuse_rate_change"], row["reuse_rate_change_ci95"]),
        f"{row['ppl_base']:.3f}",
        f"{row['ppl_tuned']:.3f}",
        _change(row["ppl_change"], row["ppl_delta_ci95"]),
        f"{row['lru_miss_change']['C=K']:+.1%}",
    ]


def _longer(row: Mapping[str, Any]) -> list[str]:
    return [
        row["text"],
        f"{row['multiple']} x",
        row["router"],
        f"{row['ppl_base_beyond']:.3f}",
        f"{row['ppl_tuned_beyond']:.3f}",
        f"{row['ppl_tuned_beyond'] / row['ppl_base_beyond'] - 1:+.2%}",
        f"{row['ppl_tuned_inside'] / row['ppl_base_inside'] - 1:+.2%}",
        f"{row['reuse_rate_tuned_beyond'] / row['reuse_rate_base_beyond'] - 1:+.1%}",
    ]


def _change(value: float, interval: Sequence[float]) -> str:
    return f"{value:+.2%} [{interval[0]:+.2%}, {interval[1]:+.2%}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def draw(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Reuse by layer, miss change by size of the cache, and what it cost by text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    totals = _rows(result, text="all")
    controls = [row for row in totals if row["router"].startswith("ce-only")]
    tuned = [row for row in totals if row not in controls]
    for row in tuned:
        parts = [r for r in _rows(result, router=row["router"], multiple=1, phase="reading") if r["text"] != "all"]
        for side, color in ("base", BASE), ("tuned", TUNED):
            layers = [_weighted(parts, f"reuse_rate_per_layer_{side}", i) for i in range(result["layers"])]
            label = side if row is tuned[0] else None
            left.plot(range(len(layers)), [100 * v for v in layers], "o-", color=color, markersize=3, label=label)
    left.axhline(100 * result["chance_reuse_rate"], color="#c0c4cc", linestyle=":", label="chance, K/E")
    left.set(xlabel="MoE layer", ylabel="reuse rate, %", title="Experts reused by the next token", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    keys = ["1/8", "1/4", "3/8", "1/2"]
    for row in tuned:
        middle.plot(keys, [100 * row["lru_miss_change"][key] for key in keys], "o-", color=TUNED, markersize=3)
    for row in controls:
        middle.plot(keys, [100 * row["lru_miss_change"][key] for key in keys], "--", color=BASE, markersize=3)
    middle.axhline(0, color="#c0c4cc", linewidth=0.8)
    middle.set(
        xlabel="C/E, slots per layer / experts", ylabel="change of LRU misses, %", title="Misses (dashed: CE only)"
    )
    texts = list(result["texts"])
    for row in tuned:
        own = [_rows(result, router=row["router"], text=text, multiple=1, phase="reading")[0] for text in texts]
        values = [100 * r["ppl_change"] for r in own]
        errors = [[abs(v - 100 * r["ppl_delta_ci95"][i]) for v, r in zip(values, own, strict=True)] for i in (0, 1)]
        right.errorbar(values, texts, xerr=errors, fmt="o", color=TUNED, markersize=3, linewidth=0.8)
    right.axvline(0, color="#c0c4cc", linewidth=0.8)
    right.set(xlabel="change of perplexity, %", title="What it costs, by text")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")


def _weighted(rows: Sequence[Mapping[str, Any]], key: str, layer: int) -> float:
    tokens = sum(row["tokens"] for row in rows)
    return float(sum(row[key][layer] * row["tokens"] for row in rows) / tokens)
