"""An evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = ("C=K", "1/8", "1/4", "3/8", "1/2")


def markdown(result: Mapping[str, Any], title: str) -> str:
    """The whole report as text with tables."""
    lines = [f"# {title}", "", *(f"- {verdict['text']}" for verdict in result["verdicts"]), ""]
    lines += _definitions(result)
    if any(len(group["routers"]) > 1 for group in result["groups"].values()) or len(result["groups"]) > 1:
        lines += _section("Settings, mean over seeds [95 % t-interval]", _GROUP, map(_group, result["groups"].items()))
    totals = select(result, text="all", phase="reading")
    lines += _section("All held-out texts", _TOTAL, map(_total, totals))
    lines += _section("By text", _TEXT, map(_text, select(result, multiple=1, phase="reading", text=None)))
    own = select(result, phase="writing")
    lines += _section("The model's own output", _WRITTEN, map(_written, own))
    longer = [row for row in result["rows"] if "beyond" in row]
    name = f"Beyond the training length of {result['length']} tokens"
    lines += _section(name, _LONGER, map(_longer, longer))
    lines += _section("Collapse check", _COLLAPSE, map(_collapse, totals))
    lines += _section("Noise floor: the base against itself", _NOISE, map(_noise, result["noise"]))
    lines += _section("Tasks, the same items for both", _TASK, map(_task, result.get("tasks", ())))
    return "\n".join(lines) + "\n"


def select(result: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values; `text=None` stands for each text but "all"."""
    return [
        row
        for row in result["rows"]
        if all(row[key] == value if value is not None else row[key] != "all" for key, value in wanted.items())
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


def change(value: float, interval: Sequence[float] | None, digits: int = 1) -> str:
    """A relative change in per cent with its interval."""
    text = f"{value:+.{digits}%}"
    return f"{text} [{interval[0]:+.{digits}%}, {interval[1]:+.{digits}%}]" if interval else text


def _definitions(result: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {slots}" for name, slots in result["slots"].items())
    totals = select(result, text="all", phase="reading")
    sequences = f"{totals[0]['sequences']} sequences, {totals[0]['tokens']} tokens" if totals else "no text"
    return [
        f"{result['model_type']}, {result['layers']} MoE layers, top {result['top_k']} of {result['experts']} experts; "
        f"{sequences} of {result['length']} from {', '.join(result['texts'])}.",
        "",
        "- Reuse rate (EOR): |E(t) and E(t-1)| / K, mean over layers and the steps within sequences; by chance it "
        f"would be {result['chance_reuse_rate']:.1%}. Changes are relative.",
        f"- Misses: event-atomic LRU, slots per layer {sizes}. Cold: empty at each sequence, as in ReMoE; carried: "
        "kept from one to the next, as in a server.",
        "- Held-out text is read teacher-forced. Own output is greedy; base and tuned write what they write.",
        "- KL(base || tuned) of the next token, nats. Load: how often an expert is used; its entropy and that of the "
        "router's probabilities are divided by log(experts), 1 is even. Reuse by load: of tokens that know nothing of "
        "each other but use experts as often.",
        "- Intervals: 95 %, paired bootstrap over sequences within each text; over seeds Student's t.",
        "",
    ]


def _section(name: str, head: Sequence[str], rows: Any) -> list[str]:
    cells = list(rows)
    return [f"## {name}", "", *table(head, cells), ""] if cells else []


_GROUP = ("setting", "seeds", "reuse", "own output", "PPL", "KL", "misses C=K", "1/4", "1/2")


def _group(item: tuple[str, Mapping[str, Any]]) -> list[str]:
    name, group = item
    own = group["writing"]
    return [
        name,
        str(len(group["routers"])),
        _seeds(group["reuse_rate_change"]),
        _seeds(own["reuse_rate_change"]) if own else "",
        _seeds(group["ppl_change"], 2),
        f"{group['kl_mean']['mean']:.4f}",
        *(_seeds(group[f"lru_miss_change {size}"]) for size in ("C=K", "1/4", "1/2")),
    ]


def _seeds(figure: Mapping[str, Any], digits: int = 1) -> str:
    return change(figure["mean"], figure["ci95"], digits)


_TOTAL = (
    "router",
    "reuse",
    "change",
    "PPL",
    "change",
    "bits per byte",
    "KL mean",
    "p99",
    *(f"misses {s}" for s in _SIZES),
)


def _total(row: Mapping[str, Any]) -> list[str]:
    return [
        row["router"],
        f"{row['reuse_rate_base']:.1%} → {row['reuse_rate_tuned']:.1%}",
        change(row["reuse_rate_change"], row["reuse_rate_change_ci95"]),
        f"{row['ppl_base']:.3f} → {row['ppl_tuned']:.3f}",
        change(row["ppl_change"], row["ppl_delta_ci95"], 2),
        f"{row['bits_per_byte_base']:.4f} → {row['bits_per_byte_tuned']:.4f}",
        f"{row['kl_mean']:.4f}",
        f"{row['kl_p99']:.3f}",
        *(change(row["lru_miss_change"][size], row["lru_miss_change_ci95"][size]) for size in _SIZES),
    ]


_TEXT = ("text", "router", "reuse", "change", "PPL", "change", "KL", "misses C=K", "1/4", "1/4 carried")


def _text(row: Mapping[str, Any]) -> list[str]:
    return [
        row["text"],
        row["router"],
        f"{row['reuse_rate_base']:.1%} → {row['reuse_rate_tuned']:.1%}",
        change(row["reuse_rate_change"], row["reuse_rate_change_ci95"]),
        f"{row['ppl_base']:.3f} → {row['ppl_tuned']:.3f}",
        change(row["ppl_change"], row["ppl_delta_ci95"], 2),
        f"{row['kl_mean']:.4f}",
        f"{row['lru_miss_change']['C=K']:+.1%}",
        f"{row['lru_miss_change']['1/4']:+.1%}",
        f"{row['lru_miss_change_carried']['1/4']:+.1%}",
    ]


_WRITTEN = ("text", "router", "reuse", "change", *(f"misses {s}" for s in _SIZES), "distinct experts")


def _written(row: Mapping[str, Any]) -> list[str]:
    return [
        row["text"],
        row["router"],
        f"{row['reuse_rate_base']:.1%} → {row['reuse_rate_tuned']:.1%}",
        change(row["reuse_rate_change"], row["reuse_rate_change_ci95"]),
        *(f"{row['lru_miss_change'][size]:+.1%}" for size in _SIZES),
        f"{row['distinct_experts_base']:.1f} → {row['distinct_experts_tuned']:.1f}",
    ]


_LONGER = ("text", "length", "sequences", "router", "PPL beyond", "change beyond", "inside", "reuse beyond", "inside")


def _longer(row: Mapping[str, Any]) -> list[str]:
    beyond, inside = row["beyond"], row["inside"]
    return [
        row["text"],
        f"{row['multiple']} x",
        str(row["sequences"]),
        row["router"],
        f"{beyond['ppl_base']:.3f} → {beyond['ppl_tuned']:.3f}",
        change(beyond["ppl_change"], beyond["ppl_delta_ci95"], 2),
        change(inside["ppl_change"], inside["ppl_delta_ci95"], 2),
        *(change(part["reuse_rate_change"], part["reuse_rate_change_ci95"]) for part in (beyond, inside)),
    ]


_COLLAPSE = (
    "router",
    "load CV",
    "reuse by load",
    "load entropy",
    "routing entropy",
    "distinct experts, mean",
    "least of a layer",
)


def _collapse(row: Mapping[str, Any]) -> list[str]:
    keys = ("load_cv", "load_reuse", "load_entropy", "routing_entropy", "distinct_experts", "distinct_experts_least")
    return [row["router"], *(f"{_number(row[f'{key}_base'])} → {_number(row[f'{key}_tuned'])}" for key in keys)]


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


_NOISE = ("computed with", "tokens", "KL mean", "p99", "PPL", "other experts")


def _noise(row: Mapping[str, Any]) -> list[str]:
    return [
        row["how"],
        str(row["tokens"]),
        f"{row['kl_mean']:.2g}",
        f"{row['kl_p99']:.2g}",
        f"{row['ppl_change']:+.4%}",
        f"{row['moved']:.3%}",
    ]


_TASK = ("task", "router", "items", "base", "tuned", "base only", "tuned only", "McNemar p")


def _task(row: Mapping[str, Any]) -> list[str]:
    return [
        *(str(row[key]) for key in ("task", "router", "items")),
        *(f"{row[key]:.1%}" for key in ("base", "tuned")),
        *(str(row[key]) for key in ("base_only", "tuned_only")),
        f"{row['p_value']:.3f}",
    ]
