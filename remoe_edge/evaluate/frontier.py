"""Perplexity against bytes per token: what a tuned router and a routing bias are worth, alone and together.

Each point decodes held-out text token by token on the runtime, with a small expert cache and, beyond the first point of
a line, the lossy bias towards experts in the cache (`CacheConfig.route_bias`). All points see the same tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.evaluate.gguf_reader import open_ggufs
from remoe_edge.evaluate.reader import Ids
from remoe_edge.evaluate.report import change, table
from remoe_edge.files import append_line
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.progress import Report, silent
from remoe_edge.runtime.llama import CacheConfig, load_model

BIASES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
COST = 0.01
"""Rise of perplexity at which lines are compared in words."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Plan:
    """What is measured. `rows` [rows, length + 1]: sequences of the texts, in their order; `nbytes` of their text."""

    models: Mapping[str, Path]
    rows: Ids
    nbytes: int
    slots: Sequence[int]
    biases: Sequence[float]
    experts: int
    policy: str | None = None
    threads: int | None = None

    def points(self) -> list[tuple[str, int, float]]:
        """Side, slots and bias of each point; those without bias first, because the others are compared with them."""
        return [
            (side, slots, bias)
            for bias in sorted({0.0, *self.biases})
            for slots in sorted(set(self.slots))
            for side in self.models
        ]

    def header(self) -> dict[str, Any]:
        """What two measurements must agree in, to be parts of one."""
        return {
            "remoe_edge_frontier": 1,
            "remoe_edge": __version__,
            "models": {side: _sha256(path) for side, path in self.models.items()},
            "tokens_sha256": hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest(),
            "policy": self.policy,
        }


def plan_frontier(
    base: Path,
    tuned: Path,
    texts: Mapping[str, Path],
    *,
    slots: Sequence[int] = (),
    biases: Sequence[float] = BIASES,
    length: int = 512,
    sequences: int = 2,
    policy: str | None = None,
    threads: int | None = None,
    report: Report = silent,
) -> Plan:
    """Read the texts with the base's tokenizer and choose budgets: by default slots for 1/8 and 1/4 of the experts.

    Raises RemoeError for GGUFs that are not the same model, for texts that are too short, and for slots that cannot
    hold one token's experts.
    """
    with open_ggufs({"base": base, "tuned": tuned}) as reader:
        sizes = sorted(set(slots)) or sorted({max(reader.top_k, reader.experts // part) for part in (8, 4)})
        if sizes[0] < reader.top_k or sizes[-1] > reader.experts:
            raise RemoeError(f"{sizes[0]} to {sizes[-1]} slots: choose from {reader.top_k} to {reader.experts}")
        rows = np.concatenate([reader.sequences(path, length, report)[:sequences] for path in texts.values()])
        return Plan(
            {"base": base, "tuned": tuned},
            rows,
            reader.text_bytes(rows),
            sizes,
            biases,
            reader.experts,
            policy,
            threads,
        )


def measure_frontier(plan: Plan, output: Path, *, force: bool = False, report: Report = silent) -> list[dict[str, Any]]:
    """Measure every point that `output`, JSON Lines, does not hold yet; each is there as soon as it is measured.

    Raises RemoeError if `output` belongs to another plan and `force` is false, or if another process writes it.
    """
    points = plan.points()
    with _journal(output, plan.header(), force) as (file, found):
        for index, (side, slots, bias) in enumerate(points):
            if (side, slots, bias) in found:
                continue
            label = f"{side}, {slots} slots" + (f", bias {bias:g}" if bias else "")

            def progress(part: float, label: str = label, index: int = index) -> None:
                report(label, (index + part) / len(points))

            point = _measure(plan, side, slots, bias, progress)
            found[side, slots, bias] = point
            append_line(file, point)
    return _compared([found[point] for point in points])


def _measure(plan: Plan, side: str, slots: int, bias: float, progress: Any) -> dict[str, Any]:
    config = CacheConfig(f"{slots}s", policy=plan.policy, route_bias=bias or None)
    losses = []
    with (
        load_model(plan.models[side], config) as model,
        model.session(n_ctx=plan.rows.shape[1], n_threads=plan.threads) as session,
    ):
        session.reset_stats()
        for index, row in enumerate(plan.rows.tolist()):
            progress(index / len(plan.rows))
            losses.append(float(session.score(row).mean()))
        stats, info = session.stats(), session.info()
    assert stats is not None
    assert info is not None
    tokens = len(plan.rows) * (plan.rows.shape[1] - 1)
    return {
        "side": side,
        "model_path": str(plan.models[side]),
        "experts": plan.experts,
        "slots": slots,
        "budget_bytes": info.budget,
        "policy": info.policy,
        "read_mode": info.io,
        "route_bias": bias,
        "tokens": tokens,
        "ppl": float(np.exp(np.mean(losses))),
        "bits_per_byte": float(np.mean(losses) * tokens / np.log(2) / plan.nbytes),
        "bytes_per_token": (stats.bytes_demand + stats.bytes_prefetch) / tokens,
        "demand_bytes_per_token": stats.bytes_demand / tokens,
        "hit_rate": stats.hit_rate,
        "nll_by_sequence": losses,
    }


def _compared(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With each point's change against the base's own routing on the same tokens."""
    draws = np.random.default_rng(0).integers(
        0, len(points[0]["nll_by_sequence"]), (_RESAMPLES, len(points[0]["nll_by_sequence"]))
    )
    for point in points:
        own = next(p for p in points if (p["side"], p["slots"], p["route_bias"]) == ("base", point["slots"], 0.0))
        rise = np.array(point["nll_by_sequence"]) - np.array(own["nll_by_sequence"])
        point["ppl_change"] = float(np.expm1(rise.mean()))
        point["ppl_change_ci95"] = [float(edge) for edge in np.percentile(np.expm1(rise[draws].mean(1)), (2.5, 97.5))]
        point["bytes_change"] = point["bytes_per_token"] / own["bytes_per_token"] - 1 if own["bytes_per_token"] else 0.0
    return points


def in_words(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each budget: how little is read by what costs at most `COST` in perplexity."""
    lines = []
    for slots in sorted({point["slots"] for point in points}):
        own = [point for point in points if point["slots"] == slots]
        base = next(point for point in own if point["side"] == "base" and point["route_bias"] == 0)
        parts = []
        for side in ("base", "tuned"):
            exact = next(point for point in own if point["side"] == side and point["route_bias"] == 0)
            if side == "tuned":
                parts.append(f"tuned {_said(exact)}")
            good = [p for p in own if p["side"] == side and p["route_bias"] and p["ppl_change"] <= COST]
            if good:
                best = min(good, key=lambda point: point["bytes_per_token"])
                parts.append(f"{side} with bias {best['route_bias']:g} {_said(best)}")
            else:
                parts.append(f"{side} with any bias costs more than {COST:.0%}")
        lines.append(
            f"{slots} of {base['experts']} experts in memory: base reads {base['bytes_per_token'] / 1e6:.3g} MB per "
            f"token at perplexity {base['ppl']:.3f}; at no more than {COST:.0%} above it: {'; '.join(parts)}."
        )
    return lines


def _said(point: Mapping[str, Any]) -> str:
    return f"{point['bytes_per_token'] / 1e6:.3g} MB ({point['bytes_change']:+.0%}) at {point['ppl_change']:+.2%}"


def frontier_markdown(points: Sequence[Mapping[str, Any]], title: str) -> str:
    """The points as a table, with what they say."""
    first = points[0]
    lines = [f"# {title}", "", *(f"- {line}" for line in in_words(points)), ""]
    lines += [
        f"{first['tokens']} held-out tokens, teacher-forced, evaluated one by one on the runtime; the same for every "
        f"point. Policy {first['policy']}; the cache is kept from one sequence to the next. Changes are against the "
        "base without bias; intervals: 95 %, paired bootstrap over sequences. The bias is lossy: it changes which "
        "experts compute.",
        "",
    ]
    head = ("slots", "router", "bias", "MB per token", "change", "hits", "PPL", "change", "bits per byte")
    rows = [
        [
            str(point["slots"]),
            point["side"],
            f"{point['route_bias']:g}",
            f"{point['bytes_per_token'] / 1e6:.4g}",
            f"{point['bytes_change']:+.1%}",
            f"{point['hit_rate']:.1%}",
            f"{point['ppl']:.4f}",
            change(point["ppl_change"], point["ppl_change_ci95"], 2),
            f"{point['bits_per_byte']:.4f}",
        ]
        for point in sorted(points, key=lambda p: (p["slots"], p["side"], p["route_bias"]))
    ]
    return "\n".join([*lines, *table(head, rows)]) + "\n"


@contextmanager
def _journal(path: Path, header: dict[str, Any], force: bool) -> Iterator[tuple[IO[bytes], dict[Any, dict[str, Any]]]]:
    """The open file, at its end, and the points that it holds."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RemoeError(f"{path}: another process is writing it; choose another --output") from error
        file.seek(0)
        content = file.read()
        # A line that was cut off by a crash is dropped.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found = {(line["side"], line["slots"], line["route_bias"]): line for line in lines[1:]}
            same = not lines or lines[0] == header
        except (ValueError, KeyError, TypeError):
            same, found = False, {}
        if not same and not force:
            raise RemoeError(
                f"{path}: was measured with other models, text or policy; choose another --output or --force"
            )
        file.truncate(len(whole) if same else 0)
        file.seek(0, os.SEEK_END)
        if not file.tell():
            found = {}
            append_line(file, header)
        yield file, found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for part in read_model(path):
        with part.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
