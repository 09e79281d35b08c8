"""Random weights in ggml's formats, made directly as blocks: gigabytes of them in seconds, without quantising floats.

Block scales stay above the smallest normal fp16 number, because subnormal scales slow the kernels down tenfold. That is
why the quantised values below use only few of the levels that their formats have: fewer levels, larger scales.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from remoe_edge.errors import RemoeError

Type = GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]

_SMALLEST_NORMAL_FP16 = 2.0**-14
_MXFP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # kvalues_mxfp4 of ggml-common.h


def random_blocks(type_: Type, count: int, rms: float, rng: np.random.Generator) -> Bytes:
    """``count`` blocks of ``type_`` as bytes [count, block bytes], with values of mean 0 and root mean square ``rms``.

    MXFP4 has powers of two for scales, so there ``rms`` is met to within a factor of sqrt(2). Raises RemoeError for a
    type that is not in TYPES, and if scales would have to be subnormal fp16 numbers.
    """
    if type_ not in _MAKERS:
        raise RemoeError(f"no random weights of type {type_.name}; use one of {', '.join(t.name for t in TYPES)}")
    return _MAKERS[type_](count, rms, rng).reshape(count, GGML_QUANT_SIZES[type_][1])


def _f32(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    return _floats(count, rms, rng).astype("<f4").view(np.uint8)


def _f16(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    values = _floats(count, rms, rng)
    _refuse_subnormal(float(np.abs(values).min(initial=1.0)), Type.F16, rms)
    return values.astype("<f2").view(np.uint8)


def _q8_0(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    scales = _scales(count, rms / _rms(np.arange(-15, 16)), Type.Q8_0, rms, rng)
    quants = rng.integers(-15, 16, size=(count, 32), dtype=np.int8)
    return np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], axis=1)


def _q4_0(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    # Quants run from -8 to 7: with scales of both signs the mean is 0 all the same.
    scales = _scales(count, rms / _rms(np.arange(-8, 8)), Type.Q4_0, rms, rng)
    signs = rng.choice(np.array([-1, 1], dtype="<f2"), size=(count, 1))
    quants = rng.integers(0, 256, size=(count, 16), dtype=np.uint8)
    return np.concatenate([(scales * signs).view(np.uint8), quants], axis=1)


def _q4_k(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    # A weight is d*s*q - dmin*m with 4-bit q, and 6-bit s and m per 32 weights. With m = s and dmin = 7.5 d, 7.5 being
    # the mean of q, weights are d*s*(q - 7.5).
    scales = _scales(count, rms / (_rms(np.arange(1, 4)) * _rms(np.arange(16) - 7.5)), Type.Q4_K, rms, rng)
    minima = (scales * np.float16(7.5)).astype("<f2")
    small = rng.integers(1, 4, size=(count, 8), dtype=np.uint8)
    # Of 12 bytes, 0-3 hold s of blocks 0-3, 4-7 hold m of blocks 0-3, 8-11 hold s (low) and m (high) of blocks 4-7.
    packed = np.concatenate([small[:, :4], small[:, :4], small[:, 4:] | small[:, 4:] << 4], axis=1)
    quants = rng.integers(0, 256, size=(count, 128), dtype=np.uint8)
    return np.concatenate([scales.view(np.uint8), minima.view(np.uint8), packed, quants], axis=1)


def _mxfp4(count: int, rms: float, rng: np.random.Generator) -> Bytes:
    exponent = round(math.log2(rms / _rms(_MXFP4_LEVELS))) + 128
    if not 2 <= exponent <= 254:
        raise RemoeError(f"MXFP4 cannot hold weights of root mean square {rms:.3g}")
    exponents = np.full((count, 1), exponent, dtype=np.uint8)
    return np.concatenate([exponents, rng.integers(0, 256, size=(count, 16), dtype=np.uint8)], axis=1)


_MAKERS: dict[Type, Callable[[int, float, np.random.Generator], Bytes]] = {
    Type.Q4_0: _q4_0,
    Type.Q8_0: _q8_0,
    Type.F16: _f16,
    Type.F32: _f32,
    Type.Q4_K: _q4_k,
    Type.MXFP4: _mxfp4,
}

TYPES = tuple(_MAKERS)


def _rms(values: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _floats(count: int, rms: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    # Both signs, and nothing near zero, where fp16 has its subnormal numbers.
    values = rng.random(count) + 0.5
    values *= rng.choice(np.array([-1.0, 1.0]), size=count) * (rms / math.sqrt(13 / 12))
    return values


def _scales(count: int, mean: float, type_: Type, rms: float, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Block scales [count, 1] between 3/4 and 5/4 of ``mean``, whose root mean square is ``mean`` to within 1.1 %."""
    scales: npt.NDArray[np.float16] = (mean * (0.75 + 0.5 * rng.random((count, 1)))).astype("<f2")
    _refuse_subnormal(float(scales.min(initial=1.0)), type_, rms)
    return scales


def _refuse_subnormal(smallest: float, type_: Type, rms: float) -> None:
    if smallest < _SMALLEST_NORMAL_FP16:
        raise RemoeError(
            f"{type_.name} weights of root mean square {rms:.3g} would need subnormal fp16 numbers; "
            "use smaller rows or F32"
        )
