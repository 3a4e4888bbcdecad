"""Fast twin of codecs/nf4.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE, SMALLEST_ABSMAX
from diffquant.quant.codecs.nf4 import BOUNDS, CODE
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.flat_blocks import absmax_of, decode_flat, encode_flat

__all__ = ["decode", "encode"]

_ONE = np.float32(1)
_BOUNDS = tuple(BOUNDS)


@inlined
def _index(scaled: np.float32) -> np.uint8:
    # How many bounds lie below: fifteen comparisons and no branch; NaN lies above all.
    index = np.int32(0)
    for bound in _BOUNDS:
        index = np.int32(index + np.int32(not bound >= scaled))
    return np.uint8(index)


@kernel
def _encode_kernel(flat: Float32, packed: Bytes, absmax: Float32) -> None:
    blocks = flat.size // BLOCK_SIZE
    for b in range(blocks):
        start = b * BLOCK_SIZE
        amax = absmax_of(flat, start, start + BLOCK_SIZE)
        absmax[b] = amax
        inverse = np.float32(_ONE / (SMALLEST_ABSMAX if amax < SMALLEST_ABSMAX else amax))
        for i in range(BLOCK_SIZE // 2):
            high = _index(np.float32(flat[start + 2 * i] * inverse))
            low = _index(np.float32(flat[start + 2 * i + 1] * inverse))
            packed[start // 2 + i] = np.uint8((high << np.uint8(4)) | low)
    start = blocks * BLOCK_SIZE
    if start < flat.size:
        amax = absmax_of(flat, start, flat.size)
        amax = SMALLEST_ABSMAX if amax < SMALLEST_ABSMAX else amax
        absmax[blocks] = amax
        for i in range(start // 2, packed.size):
            high = _index(np.float32(flat[2 * i] / amax))
            low = _index(np.float32(flat[2 * i + 1] / amax)) if 2 * i + 1 < flat.size else 7
            packed[i] = np.uint8((high << np.uint8(4)) | np.uint8(low))


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to NF4; see codecs/nf4.py."""
    del stats, fmt
    return encode_flat(weight, _encode_kernel)


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look indices up and multiply by their block's absmax; see codecs/nf4.py."""
    del fmt
    return decode_flat(parts, shape, CODE)
