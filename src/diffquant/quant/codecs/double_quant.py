"""NF4 and FP4 whose absmax are quantized again, to 8 bits: bitsandbytes' double quantization.

    weight          as in codecs/nf4.py or codecs/fp4_bnb.py
    absmax          ceil(R * K / 64) uint8, a code of the dynamic map each
    nested_absmax   ceil(blocks / 256) float32
    nested_offset   () float32, the mean of all absmax before they were quantized

    absmax = DYNAMIC_MAP[code] * nested_absmax + nested_offset

`reduce` sums up the absmax of a chunk: their mean must be known before the first block is written.
The sum is taken in float64, torch's is not: the offsets agree to 1e-6 of their value, and the codes
are bitsandbytes' for the same offset (tested). Source: bitsandbytes 0.50.2 functional.py:938-952,
backends/cpu/ops.py quantize_blockwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs import fp4_bnb, nf4
from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP, nearest_codes

__all__ = ["NESTED_BLOCK", "Mean", "compress", "decode", "encode", "expand", "reduce"]

NESTED_BLOCK = 256  # absmax that share a nested_absmax
Mean = tuple[float, int]  # a sum, and of how many
_PLAIN = {"nf4_dq": nf4, "fp4_dq": fp4_bnb}


def reduce(weight: Float32, stats: Mean | None = None, *, fmt: str) -> Mean:
    """Add the absmax of a chunk's blocks to a sum; `stats` is the sum so far."""
    absmax = _PLAIN[fmt].encode(weight, fmt=fmt)["absmax"]
    total, count = stats or (0.0, 0)
    return total + float(absmax.sum(dtype=np.float64)), count + absmax.size


def compress(absmax: Float32, offset: np.float32) -> Parts:
    """Quantize absmax to 8 bits around their mean.

    Args:
        absmax: (B,) float32; B a multiple of 256 unless these end the tensor.
        offset: mean of all absmax of the tensor.

    Returns:
        absmax: (B,) uint8; nested_absmax: (ceil(B / 256),) float32; nested_offset: () float32.
    """
    with np.errstate(invalid="ignore"):
        moved = absmax - offset
    padded = np.zeros(-(-moved.size // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    padded[: moved.size] = moved
    blocks = padded.reshape(-1, NESTED_BLOCK)
    nested = np.abs(blocks).max(axis=1, initial=0)
    with np.errstate(all="ignore"):
        codes = nearest_codes(blocks * (np.float32(1) / nested)[:, None])
    codes[nested == 0] = 0
    return {
        "absmax": codes.reshape(-1)[: moved.size],
        "nested_absmax": nested,
        "nested_offset": np.asarray(offset, np.float32),
    }


def expand(parts: Mapping[str, NDArray[Any]]) -> Float32:
    """Absmax of blocks as float32, from their codes."""
    codes = parts["absmax"].reshape(-1)
    nested = np.repeat(parts["nested_absmax"].reshape(-1), NESTED_BLOCK)[: codes.size]
    with np.errstate(all="ignore"):
        absmax: Float32 = DYNAMIC_MAP[codes] * nested + np.float32(parts["nested_offset"])
    return absmax


def encode(weight: Float32, stats: Mean | None = None, *, fmt: str) -> Parts:
    """Quantize rows, and their absmax again.

    Args:
        weight: (R, K) float32, C-contiguous; R * K a multiple of 16384 unless the rows end the
            tensor.
        stats: sum and number of all absmax of the tensor; None takes those of these rows.
        fmt: nf4_dq or fp4_dq.

    Returns:
        The parts named above.

    Error: that of the plain format, and 1 % of the largest absmax among 256.
    """
    parts = _PLAIN[fmt].encode(weight, fmt=fmt)
    total, count = stats or reduce(weight, fmt=fmt)
    return {**parts, **compress(parts["absmax"], np.float32(total / max(count, 1)))}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Decode absmax, then the numbers.

    Args:
        parts: as `encode` returns them.
        shape: (R, K).
        fmt: nf4_dq or fp4_dq.
    """
    plain = {"weight": parts["weight"], "absmax": expand(parts)}
    weight: Float32 = _PLAIN[fmt].decode(plain, shape, fmt=fmt)
    return weight
