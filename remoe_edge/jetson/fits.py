"""What fits on which board, and what time per token to expect: a prediction from sizes, traces and data sheets.

Nothing here was measured on a board. Memory is divided as the runtime's `auto` does it; hit rates are those of the
packaged traces at the same part of the experts held; TPOT lies between max(T_resident, bytes missed / storage) and
their sum. T_resident is what a token reads of memory over a part of the board's bandwidth.
`python -m remoe_edge.jetson.fits` prints the table of docs/jetson.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from remoe_edge.measure.plan import Curves, Memory
from remoe_edge.progress import silent
from remoe_edge.routing.predict import predict_tpot
from remoe_edge.runtime.budget import ExpertGroup, least_slots, most_slots, slots_for
from remoe_edge.runtime.footprint import N_UBATCH, Footprint
from remoe_edge.runtime.llama import POLICIES

EFFICIENCY = (0.28, 0.5)
"""Of the memory's bandwidth, least and most: an owner reported the first for Qwen2.5-Coder-1.5B Q4_K_M on an Orin Nano
(realizar #120); the second is an assumption."""
STORAGE_BYTES_PER_S = 2e9
"""Of an NVMe drive for reads of one expert's slice, four at once; the plan of a real drive measures it."""
SYSTEM_BYTES = 1 << 30
"""Left to the system, without a desktop."""
CONTEXT = 4096

_GIB = 1 << 30
_KV_BYTES = 2


@dataclass(frozen=True)
class Board:
    """`memory` is what Linux sees of it, in bytes; `bytes_per_s` the memory's bandwidth by data sheet."""

    name: str
    memory: int
    bytes_per_s: float


@dataclass(frozen=True)
class MoeModel:
    """Sizes of a published model, from its config.json.

    Attributes
    ----------
    dense, read
        Weights outside of routed experts, and how many of them a token reads (not the embeddings).
    expert_bits, dense_bits
        Mean bits for each weight of the quantisation, scales included.
    kv
        Numbers that the KV cache keeps for each token.
    """

    name: str
    quantisation: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    ff: int
    vocabulary: int
    dense: float
    read: float
    expert_bits: float
    dense_bits: float
    kv: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert in one layer."""
        return int(3 * self.hidden * self.ff * self.expert_bits / 8)

    @property
    def bytes(self) -> int:
        return int(self.dense * self.dense_bits / 8) + self.layers * self.experts * self.expert_bytes

    @property
    def groups(self) -> list[ExpertGroup]:
        """As of a file whose slices are aligned."""
        slices = tuple((0, self.expert_bytes // 3 // 4096 * 4096) for _ in range(3))
        return [ExpertGroup(self.experts, self.top_k, slices)] * self.layers

    def footprint(self, n_ctx: int) -> Footprint:
        floats = max(self.vocabulary + 3 * self.hidden, 10 * self.hidden, self.top_k * (3 * self.ff + 2 * self.hidden))
        return Footprint(
            int(self.dense * self.dense_bits / 8),
            self.kv * _KV_BYTES * n_ctx,
            N_UBATCH * (4 * floats + 2 * n_ctx),
            int(self.read * self.dense_bits / 8),
        )


# By data sheet; memory as Linux shows it on an Orin NX 16 GB (15656 MiB), and the same part of it on the others.
BOARDS = (
    Board("Orin Nano 8 GB", 7828 << 20, 68e9),
    Board("Orin NX 8 GB", 7828 << 20, 102.4e9),
    Board("Orin NX 16 GB", 15656 << 20, 102.4e9),
    Board("AGX Orin 32 GB", 31312 << 20, 204.8e9),
    Board("AGX Orin 64 GB", 62624 << 20, 204.8e9),
)
# Q4_K_M: gate and up in Q4_K, half of the down matrices in Q6_K.
MODELS = (
    MoeModel("OLMoE-1B-7B", "Q4_K_M", 16, 64, 8, 2048, 1024, 50304, 0.477e9, 0.374e9, 4.85, 5.5, 2 * 16 * 2048),
    MoeModel("DeepSeek-V2-Lite", "Q4_K_M", 26, 64, 6, 2048, 1408, 102400, 1.312e9, 1.102e9, 5.2, 5.5, 27 * 576),
    MoeModel("gpt-oss-20b", "MXFP4", 24, 32, 4, 2880, 2880, 201088, 1.797e9, 1.218e9, 4.25, 8.5, 2 * 24 * 512),
    MoeModel("Qwen3-30B-A3B", "Q4_K_M", 48, 128, 8, 2048, 768, 151936, 1.541e9, 1.230e9, 4.85, 5.5, 2 * 48 * 512),
)


@dataclass(frozen=True)
class Fit:
    """A model on a board. ``slots`` is 0 if not even one token's experts fit; the rest is then None.

    Attributes
    ----------
    budget
        Bytes left for the expert cache.
    hit_rate, read_bytes, tpot_ms
        The least and the most.
    """

    model: MoeModel
    board: Board
    budget: int
    slots: int
    hit_rate: tuple[float, float] | None
    read_bytes: tuple[float, float] | None
    tpot_ms: tuple[float, float] | None


def fit(model: MoeModel, board: Board, *, n_ctx: int = CONTEXT, storage: float = STORAGE_BYTES_PER_S) -> Fit:
    """Predict how a model decodes on a board, from storage of so many bytes per second."""
    needs = model.footprint(n_ctx)
    budget = Memory.divide(board.memory - SYSTEM_BYTES, needs).cache
    policy = POLICIES[0]
    slots = slots_for(model.groups, budget, policy)
    if slots == 0:
        return Fit(model, board, budget, 0, None, None, None)
    _, low, high = _rates(model, slots)
    used = model.layers * model.top_k * model.expert_bytes
    read = tuple((1 - rate) * used for rate in (high, low))
    slowest, fastest = (1e3 * (needs.read + used) / (board.bytes_per_s * part) for part in EFFICIENCY)
    tpot = predict_tpot(fastest, read[0], storage).limit_ms, predict_tpot(slowest, read[1], storage).no_overlap_ms
    return Fit(model, board, budget, slots, (low, high), (read[0], read[1]), tpot)


def fits(models: Sequence[MoeModel] = MODELS, boards: Sequence[Board] = BOARDS) -> Iterator[Fit]:
    """Every model on every board."""
    for model in models:
        for board in boards:
            yield fit(model, board)


def markdown() -> str:
    """The table of docs/jetson.md."""
    lines = [
        "| model | file | board | expert cache | experts held | hits | read per token | TPOT, predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in fits():
        model = each.model
        name = f"{model.name} {model.quantisation} | {model.bytes / 1e9:.1f} GB"
        if each.hit_rate is None or each.read_bytes is None or each.tpot_ms is None:
            lines.append(f"| {name} | {each.board.name} | does not fit | | | | |")
            continue
        whole = each.slots == model.experts
        held = "all" if whole else f"{each.slots} of {model.experts}"
        hits = "100 %" if whole else f"{each.hit_rate[0] * 100:.0f} - {each.hit_rate[1] * 100:.0f} %"
        read = "0" if whole else f"{each.read_bytes[0] / 1e6:.0f} - {each.read_bytes[1] / 1e6:.0f} MB"
        size = min(each.budget, model.layers * model.experts * model.expert_bytes)
        tpot = f"{each.tpot_ms[0]:.0f} - {each.tpot_ms[1]:.0f} ms"
        lines.append(f"| {name} | {each.board.name} | {size / _GIB:.1f} GiB | {held} | {hits} | {read} | {tpot} |")
    return "\n".join(lines) + "\n"


@cache
def _rates(model: MoeModel, slots: int) -> tuple[float, float, float]:
    groups = model.groups
    if slots == most_slots(groups):
        return 1.0, 1.0, 1.0
    count = max(slots, least_slots(groups))
    return Curves(groups, None, silent).rates([count], POLICIES[0])[count]


if __name__ == "__main__":
    print(markdown(), end="")
