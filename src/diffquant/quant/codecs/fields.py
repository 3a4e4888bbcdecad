"""Fields of ggml blocks: halves, nibbles, fifth bits, rounding. Arrays hold one block per row.

Blocks of 32 keep weight j and weight j + 16 in the low and high nibble of byte j, and fifth bits
in one little-endian 32-bit word, bit j for weight j. Source: ggml-quants.c,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32

__all__ = [
    "fifth_bits",
    "half_bytes",
    "halves",
    "inverse",
    "nearest_int",
    "nibble_bytes",
    "nibbles",
    "peak",
    "read_fifth_bits",
    "round_half_away",
    "spread",
    "truncate",
]

_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the rounded integer in the mantissa


def half_bytes(values: Float32) -> Bytes:
    """(B,) float32 -> (B, 2) bytes of float16, half to even, subnormals exact, overflow to inf."""
    return values.astype("<f2")[:, None].view(np.uint8)


def halves(packed: Bytes) -> Float32:
    """(B, 2) bytes of float16 -> (B, 1) float32."""
    return np.ascontiguousarray(packed).view("<f2").astype(np.float32)


def nibble_bytes(levels: Bytes) -> Bytes:
    """(B, 32) levels -> (B, 16): low nibbles of the first half, of the second half above them."""
    return levels[:, :16] & np.uint8(15) | levels[:, 16:] << np.uint8(4)


def nibbles(packed: Bytes) -> Bytes:
    """(B, 16) -> (B, 32), the inverse of `nibble_bytes`."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def fifth_bits(levels: Bytes) -> Bytes:
    """(B, 32) levels -> (B, 4): bit 4 of each."""
    return np.packbits(levels >> 4 & 1, axis=1, bitorder="little")


def read_fifth_bits(packed: Bytes) -> Bytes:
    """(B, 4) -> (B, 32) of 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little") << np.uint8(4)


def peak(blocks: Float32) -> Float32:
    """(B, n) -> (B, 1): first element of largest magnitude, sign kept; +0 for zeros and NaN."""
    size = np.where(np.isnan(blocks), np.float32(0), np.abs(blocks))  # C's > passes NaN over
    index = size.argmax(axis=1, keepdims=True)
    found = np.take_along_axis(blocks, index, axis=1)
    return np.where(np.take_along_axis(size, index, axis=1) == 0, np.float32(0), found)


def spread(blocks: Float32) -> tuple[Float32, Float32]:
    """(B, n) -> smallest and largest element, (B, 1) each; of equal zeros the first."""
    low = np.take_along_axis(blocks, blocks.argmin(axis=1, keepdims=True), axis=1)
    high = np.take_along_axis(blocks, blocks.argmax(axis=1, keepdims=True), axis=1)
    return low, high


def inverse(scale: Float32) -> Float32:
    """1 / scale, and 0 where the scale is 0."""
    return np.where(scale != 0, np.float32(1) / scale, np.float32(0))


def truncate(values: Float32) -> Int32:
    """Round toward zero; what no int32 holds becomes 0, the low byte x86 leaves for it."""
    return np.where(np.abs(values) < 2.0**31, values, 0).astype(np.int32)


def round_half_away(values: Float32) -> Int32:
    """C's roundf, and 0 for what no int32 holds."""
    whole = truncate(values)
    rest = values - whole.astype(np.float32)  # exact; a huge value leaves more than 1
    away = (rest >= 0.5).astype(np.int32) - (rest <= -0.5).astype(np.int32)
    return np.where(np.abs(rest) < 1, whole + away, whole)


def nearest_int(values: Float32) -> Int32:
    """Round half to even for |values| < 2**22; beyond, the same wrapped bits as ggml's."""
    return ((values + _MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000
