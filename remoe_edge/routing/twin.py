"""Twins: models with random weights that route as a trace says, in any unmodified llama.cpp.

The router rows of all layers together are orthonormal. The embedding of step t is a weighted sum of the rows that the
trace chose at t, the first choice weighing most. Attention and experts run in full, on weights so small that they move
the residual by less than a hundredth per block. So every router still sees the embedding (RMS norm only scales it: its
weights are 1), and its logits are the weights in the sum for the chosen experts and about 0 for the others. The output
row of step t + 1 is the unit embedding of step t, so greedy decoding walks the trace, and after the last step starts
again with the first. A small part of the embedding that no router sees tells steps apart that route alike.

Steps are the tokens "w00000", "w00001", ... Other text is read byte by byte, and each byte has the embedding of some
step: any prompt routes like the trace, and decoding goes on from the step that its last byte stands for. BOS stands for
the last step.
"""

import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, TokenType

from remoe_edge import __version__
from remoe_edge.errors import RemoeError
from remoe_edge.files import atomic_output, refuse_existing
from remoe_edge.gguf_io.blocks import Bytes, random_blocks
from remoe_edge.gguf_io.layout import DEFAULT_ALIGNMENT, check_alignment
from remoe_edge.gguf_io.stream import NewTensor, Piece, Value, write_gguf
from remoe_edge.routing.shapes import ARCHITECTURES, ModelShape, Spec, metadata, tensors
from remoe_edge.routing.trace import Trace
from remoe_edge.sizes import format_size

Floats = npt.NDArray[np.float32]

QUANTS = {
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "Q4_K": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "MXFP4": (GGMLQuantizationType.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
}
"""Types of expert weights, with the file type that goes with them."""

_CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
_FIRST_STEP = len(_CONTROL_TOKENS) + 256

# How much larger the output of a matrix is than its input, in root mean square. The products along the ways through
# attention (v, o) and through an expert (gate, up, down) keep each below a hundredth of the residual.
_GAINS = {"q": 1.0, "k": 1.0, "kv": 1.0, "v": 0.06, "o": 0.06, "gate": 0.2, "up": 0.2, "down": 0.2}
# gpt-oss computes (up + 1) * gate * sigmoid(1.702 gate): the 1 makes a larger value than a small up does.
_GPT_OSS_DOWN_GAIN = 0.05
_BIAS_RMS = 1e-3

# Length of a step's signature, relative to that of its router rows if all had weight 1.
_SIGNATURE_NORM = 0.3
_SIGNATURE_SIZE = 64

_POOL_BYTES = 4 << 20
_CHUNK_STEPS = 1024


@dataclass(frozen=True)
class Twin:
    """A twin that can be written. Use `plan_twin` to make one: it checks that the sizes work."""

    trace: Trace
    shape: ModelShape
    quant: str
    seed: int
    alignment: int

    @cached_property
    def tensors(self) -> list[NewTensor]:
        return [NewTensor(spec.name, spec.shape, tensor_type(spec, self.quant)) for spec in self._specs.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data; the file is larger by `padding_bytes` and its header, about 20 bytes per step."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def padding_bytes(self) -> int:
        """Bytes between tensors, so that each starts on a multiple of ``alignment``."""
        return sum(-tensor.nbytes % self.alignment for tensor in self.tensors)

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        return {spec.name: spec for spec in tensors(self.shape)}

    def _data(self, tensor: NewTensor) -> Iterator[Piece]:
        spec = self._specs[tensor.name]
        if spec.role == "embedding":
            yield from self._embedding_rows()
        elif spec.role == "output":
            yield from self._output_rows()
        elif spec.role == "router":
            assert spec.layer is not None
            yield self._router_rows[spec.layer]
        elif spec.role == "norm":
            yield np.ones(spec.shape, dtype=np.float32)
        elif spec.role in ("bias", "sinks"):
            rms = _BIAS_RMS if spec.role == "bias" else 1.0
            yield random_blocks(tensor.type, math.prod(spec.shape), rms, self._rng(spec.name))
        else:
            yield from self._matrix(spec, tensor)

    def _matrix(self, spec: Spec, tensor: NewTensor) -> Iterator[Bytes]:
        gain = _GPT_OSS_DOWN_GAIN if spec.role == "down" and self.shape.arch == "gpt-oss" else _GAINS[spec.role]
        pool = self._pool(tensor.type, gain / math.sqrt(spec.shape[0]))
        experts = spec.shape[2] if spec.is_expert else 1
        blocks = tensor.nbytes // experts // pool.shape[1]
        # Every expert starts at a place of its own in the pool, so no two have the same bytes.
        for start in self._rng(spec.name).choice(len(pool), size=experts, replace=False).tolist():
            left = blocks
            while left:
                piece = pool[start : start + left]
                yield piece
                left -= len(piece)
                start = 0

    def _pool(self, type_: GGMLQuantizationType, rms: float) -> Bytes:
        key = f"{type_.name} {rms!r}"
        if key not in self._pools:
            count = _POOL_BYTES // GGML_QUANT_SIZES[type_][1]
            self._pools[key] = random_blocks(type_, count, rms, self._rng(key))
        return self._pools[key]

    @cached_property
    def _pools(self) -> dict[str, Bytes]:
        return {}

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    @cached_property
    def _rows(self) -> Floats:
        """[layers * experts + signature size, hidden], orthonormal."""
        routers = self.shape.layers * self.shape.experts
        count = min(routers + _SIGNATURE_SIZE, self.shape.hidden)
        return orthonormal_rows(count, self.shape.hidden, self._rng("rows"))

    @cached_property
    def _router_rows(self) -> Floats:
        """[layers, experts, hidden]"""
        layers, experts = self.shape.layers, self.shape.experts
        return self._rows[: layers * experts].reshape(layers, experts, -1)

    @cached_property
    def _signatures(self) -> Floats:
        """[steps, signature size]: coefficients of the rows that no router looks at.

        Steps may choose the same experts in all layers, and would then have the same successor. The signature tells
        them apart; where the routers leave no room for one, the differences in their weights still do.
        """
        size = len(self._rows) - self.shape.layers * self.shape.experts
        signs = self._rng("signatures").choice(np.array([-1.0, 1.0]), size=(self.trace.tokens, size))
        norm = _SIGNATURE_NORM * math.sqrt(self.shape.layers * self.shape.top_k)
        signatures: Floats = (signs * norm / math.sqrt(max(size, 1))).astype(np.float32)
        return signatures

    @cached_property
    def _weights(self) -> Floats:
        """[steps, layers, k], falling along k by at least 0.5 / k from at most 2 to at least 1."""
        k = self.shape.top_k
        jitter = self._rng("weights").random((self.trace.tokens, self.shape.layers, k))
        weights: Floats = (2.0 - (np.arange(k) + 0.5 * jitter) / k).astype(np.float32)
        return weights

    def _step_embeddings(self, steps: npt.NDArray[np.int64]) -> Floats:
        """[len(steps), hidden], of root mean square 1."""
        total = np.zeros((len(steps), self.shape.hidden), dtype=np.float32)
        # Summed in a fixed order, one product at a time, which rounds alike everywhere; a matrix product does not.
        for layer in range(self.shape.layers):
            for rank in range(self.shape.top_k):
                rows = self._router_rows[layer, self.trace.ids[steps, layer, rank]]
                total += self._weights[steps, layer, rank, None] * rows
        for row, coefficients in zip(self._rows[::-1], self._signatures[steps].T, strict=False):
            total += coefficients[:, None] * row
        total /= np.sqrt(np.square(total, dtype=np.float64).mean(axis=1, keepdims=True)).astype(np.float32)
        return total

    def _embedding_rows(self) -> Iterator[npt.NDArray[np.float16]]:
        for steps in _chunks(token_steps(self.trace.tokens)):
            yield self._step_embeddings(steps).astype("<f2")

    def _output_rows(self) -> Iterator[npt.NDArray[np.float16]]:
        yield np.zeros((_FIRST_STEP, self.shape.hidden), dtype="<f2")
        for steps in _chunks((np.arange(self.trace.tokens) - 1) % self.trace.tokens):
            yield (self._step_embeddings(steps) / np.float32(math.sqrt(self.shape.hidden))).astype("<f2")

    def _metadata(self) -> dict[str, Value]:
        meta = self.trace.meta
        model = str(meta.get("model", "unknown model"))
        keys: dict[str, Value] = {
            "general.type": "model",
            "general.name": f"twin of {model}",
            "general.description": (
                f"Random weights that replay a routing trace of {model}; for measuring and testing, not for text. "
                f"Trace: {meta.get('source', 'unknown source')}, licence {meta.get('licence', 'unknown')}."
            ),
            "general.license": str(meta.get("licence") or "other"),
            "general.file_type": int(QUANTS[self.quant][1]),
            "general.quantization_version": 2,
            **metadata(self.shape),
            **step_tokenizer(self.trace.tokens),
            "remoe.version": __version__,
            "remoe.twin.seed": self.seed,
            "remoe.twin.steps": self.trace.tokens,
            "remoe.twin.trace.sha256": self.trace.digest(),
        }
        for key in ("model", "source", "licence", "phase"):
            if meta.get(key):
                keys[f"remoe.twin.trace.{key}"] = str(meta[key])
        if meta.get("first_token"):
            keys["remoe.twin.trace.first_token"] = int(meta["first_token"])
        return keys


def plan_twin(
    trace: Trace,
    *,
    arch: str = "olmoe",
    hidden: int = 2048,
    ff: int = 1024,
    quant: str = "Q4_0",
    layers: int | None = None,
    seed: int = 0,
    alignment: int = DEFAULT_ALIGNMENT,
) -> Twin:
    """A twin of ``trace`` with experts of size ``ff`` and type ``quant``, replaying its first ``layers`` MoE layers.

    Tensors start on multiples of ``alignment`` bytes in the file; so do the experts in them whose size is one. The same
    arguments give the same file. Raises RemoeError if the trace has gaps, if hidden size, layers and experts do not
    allow orthonormal router rows, if the sizes fit neither the architecture nor the type, or for an alignment that
    `check_alignment` refuses.
    """
    check_alignment(alignment)
    if arch not in ARCHITECTURES:
        raise RemoeError(f"no twins of architecture {arch!r}; use one of {', '.join(ARCHITECTURES)}")
    if quant not in QUANTS:
        raise RemoeError(f"no twins of type {quant!r}; use one of {', '.join(QUANTS)}")
    if not trace.computed.all():
        missing = int((~trace.computed).any(axis=1).sum())
        raise RemoeError(
            f"{trace.origin}: {missing} of {trace.tokens} tokens have layers that were not computed, as prompt tokens "
            "do; a twin needs a trace of decoding"
        )
    replayed = trace.layers if layers is None else layers
    if not 1 <= replayed <= trace.layers:
        raise RemoeError(f"{trace.origin} has {trace.layers} layers, {replayed} cannot be replayed")
    shape = ModelShape(
        arch=arch,
        hidden=hidden,
        ff=ff,
        layers=replayed,
        experts=trace.experts,
        top_k=trace.top_k,
        vocabulary=_FIRST_STEP + trace.tokens,
        context=max(4096, math.ceil(trace.tokens / 256) * 256),
        # As in the DeepSeek models, where the first block has no experts.
        dense_blocks=1 if arch == "deepseek2" else 0,
    )
    shape.check()
    rows = replayed * trace.experts
    if rows > hidden:
        raise RemoeError(
            f"{replayed} layers of {trace.experts} experts need {rows} orthogonal router rows, but rows of the hidden "
            f"size {hidden} allow no more than {hidden}; use --hidden {math.ceil(rows / 256) * 256} or "
            "fewer --layers"
        )
    block = GGML_QUANT_SIZES[QUANTS[quant][0]][0]
    for name, size in ("--hidden", hidden), ("--ff", ff):
        if size % block:
            raise RemoeError(f"{name} {size} is not a multiple of {block}, the block of {quant}")
    return Twin(trace, shape, quant, seed, alignment)


def write_twin(
    twin: Twin, path: Path, *, force: bool = False, progress: Callable[[int], None] = lambda _written: None
) -> None:
    """Write a twin; ``progress`` is called with the bytes of tensor data written so far, of ``twin.nbytes``.

    Raises RemoeError if ``path`` exists and ``force`` is false, or the filesystem has too little free space.
    """
    refuse_existing(path, force)
    with atomic_output(path, force=force) as temporary:
        free = shutil.disk_usage(temporary.parent).free
        need = twin.nbytes + twin.padding_bytes
        if free < need:
            raise RemoeError(
                f"{path} takes {format_size(need)}, but its filesystem has {format_size(free)} free; "
                "make room or choose a smaller --ff"
            )
        write_gguf(temporary, twin.shape.arch, twin._metadata(), twin.tensors, twin._data, progress, twin.alignment)


def tensor_type(spec: Spec, quant: str) -> GGMLQuantizationType:
    """The type of a tensor in a model whose experts are of type ``quant``, a key of QUANTS."""
    if spec.role in ("embedding", "output"):
        return GGMLQuantizationType.F16
    if spec.role not in _GAINS and spec.role != "gate_up":
        return GGMLQuantizationType.F32
    wanted = QUANTS[quant][0]
    if spec.is_expert:
        return wanted
    # Dense matrices have the type of the experts where it fits; no one publishes models with MXFP4 outside experts.
    for type_ in (wanted, GGMLQuantizationType.Q8_0):
        if type_ != GGMLQuantizationType.MXFP4 and spec.shape[0] % GGML_QUANT_SIZES[type_][0] == 0:
            return type_
    return GGMLQuantizationType.F16


def orthonormal_rows(count: int, size: int, rng: np.random.Generator) -> Floats:
    """[count, size] orthonormal rows with no small set of large entries: rows of a cosine transform, signs flipped.

    The same on every machine, which the factors of a random matrix would not be.
    """
    # Row i of the transform has cos(pi / size * (j + 1/2) * i) at j; all cosines are in one table.
    table = np.array([math.cos(math.pi * n / (2 * size)) for n in range(4 * size)])
    rows = rng.permutation(size)[:count, None]
    values = table[(2 * np.arange(size) + 1) * rows % (4 * size)] * math.sqrt(2 / size)
    values[rows[:, 0] == 0] *= math.sqrt(0.5)
    values *= rng.choice(np.array([-1.0, 1.0]), size=size)
    result: Floats = values.astype(np.float32)
    return result


def step_tokenizer(steps: int) -> dict[str, Value]:
    """Metadata of a tokenizer that knows control tokens, all bytes, and the steps "w00000", "w00001", ..."""
    digits = max(5, len(str(steps - 1)))
    texts = [
        *_CONTROL_TOKENS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(f"w{step:0{digits}d}" for step in range(steps)),
    ]
    types = [
        *(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL),
        *[TokenType.BYTE] * 256,
        *[TokenType.USER_DEFINED] * steps,
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * len(texts),
        "tokenizer.ggml.token_type": [int(type_) for type_ in types],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def step_token(step: int) -> int:
    """The token id of a step."""
    return _FIRST_STEP + step


def token_steps(steps: int) -> npt.NDArray[np.int64]:
    """[vocabulary]: the step whose embedding each token has. Bytes are spread evenly over the steps."""
    control = np.full(len(_CONTROL_TOKENS), steps - 1)
    return np.concatenate([control, np.arange(256) * steps // 256, np.arange(steps)])


def _chunks(steps: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(steps), _CHUNK_STEPS):
        yield steps[start : start + _CHUNK_STEPS]
