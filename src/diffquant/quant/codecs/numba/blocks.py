"""What kernels of block formats share: scales as bytes, and the allocation around a kernel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, frozen
from diffquant.quant.codecs.numba.compile import inlined
from diffquant.quant.codecs.numba.floats import (
    float_from_half,
    float_key,
    half_from_float,
    magnitude_bits,
)

__all__ = [
    "decoder",
    "encoder",
    "fifth_bit",
    "inverse",
    "load_half",
    "load_short",
    "load_word",
    "peak",
    "spread",
    "store_half",
    "store_word",
    "unweighted",
    "weighted",
]

_SIGN = np.uint32(0x80000000)
_LOWEST = np.int32(-(2**31))
_HIGHEST = np.int32(2**31 - 1)
_ZERO = np.float32(0)
_ONE = np.float32(1)


def encoder(
    kernel: Callable[[Float32, Bytes], None], block_nbytes: int
) -> Callable[[Float32], Bytes]:
    """Wrap a kernel (blocks, packed) as a function blocks -> packed, (B, block_nbytes)."""

    def encode_blocks(weight: Float32) -> Bytes:
        packed = np.empty((len(weight), block_nbytes), np.uint8)
        kernel(weight, packed)
        return packed

    return encode_blocks


def decoder(
    kernel: Callable[[Bytes, Float32], None], block_size: int
) -> Callable[[Bytes], Float32]:
    """Wrap a kernel (packed, blocks) as a function packed -> blocks, (B, block_size)."""

    def decode_blocks(packed: Bytes) -> Float32:
        weight = np.empty((len(packed), block_size), np.float32)
        kernel(packed, weight)
        return weight

    return decode_blocks


def unweighted(
    kernel: Callable[[Float32, Float32, Bytes], None], block_size: int, block_nbytes: int
) -> Callable[[Float32], Bytes]:
    """Wrap a kernel (blocks, importance, packed) for the mode without: no rows of importance."""
    nothing = frozen(np.empty((0, block_size), np.float32), (0, block_size))

    def encode_blocks(weight: Float32) -> Bytes:
        packed = np.empty((len(weight), block_nbytes), np.uint8)
        kernel(weight, nothing, packed)
        return packed

    return encode_blocks


def weighted(
    kernel: Callable[[Float32, Float32, Bytes], None], block_size: int, block_nbytes: int
) -> Callable[[Float32, Float32], Bytes]:
    """Wrap the same kernel for rows (R, K) and importance (K,): both are cut into blocks."""

    def encode_rows(rows: Float32, importance: Float32) -> Bytes:
        weight = frozen(rows, (-1, block_size))
        packed = np.empty((len(weight), block_nbytes), np.uint8)
        kernel(weight, frozen(importance, (-1, block_size)), packed)
        return packed

    return encode_rows


@inlined
def store_half(packed: Bytes, block: int, at: int, value: np.float32) -> None:
    """Write float16 little-endian at byte `at` of a block."""
    bits = half_from_float(value)
    packed[block, at] = np.uint8(bits & np.uint16(0xFF))
    packed[block, at + 1] = np.uint8(bits >> np.uint16(8))


@inlined
def load_half(packed: Bytes, block: int, at: int) -> np.float32:
    """Read float16 little-endian at byte `at` of a block."""
    high = np.uint16(np.uint16(packed[block, at + 1]) << np.uint16(8))
    return np.float32(float_from_half(np.uint16(high | np.uint16(packed[block, at]))))


@inlined
def load_short(packed: Bytes, block: int, at: int) -> np.int32:
    """Read 16 bits little-endian at byte `at` of a block."""
    high = np.int32(np.int32(packed[block, at + 1]) << np.int32(8))
    return np.int32(np.int32(packed[block, at]) | high)


@inlined
def inverse(scale: np.float32) -> np.float32:
    """1 / scale, and 0 where the scale is 0."""
    return np.float32(_ONE / scale) if scale != _ZERO else _ZERO


@inlined
def peak(weight: Float32, block: int) -> np.float32:
    """First element of largest magnitude, sign kept; +0 for a zero block."""
    positive = np.int32(0)  # bits of the largest positive element
    negative = np.uint32(0)  # bits, sign included, of the most negative one
    for j in range(weight.shape[1]):
        bits = np.float32(weight[block, j]).view(np.int32)
        positive = bits if bits > positive else positive
        unsigned = np.float32(weight[block, j]).view(np.uint32)
        negative = unsigned if unsigned > negative else negative
    below = np.int32(negative & np.uint32(0x7FFFFFFF)) if negative >= _SIGN else np.int32(0)
    if positive == below:  # both signs reach it: the first one in order decides
        for j in range(weight.shape[1]):
            value = np.float32(weight[block, j])
            if magnitude_bits(value) == positive and positive != np.int32(0):
                return value
        return _ZERO
    if positive > below:
        return np.float32(np.int32(positive).view(np.float32))
    return np.float32(-np.int32(below).view(np.float32))


@inlined
def _is_zero(key: np.int32) -> bool:
    return bool(key == np.int32(0) or key == np.int32(-1))  # +0, -0


@inlined
def _from_key(key: np.int32) -> np.float32:
    bits = np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & _HIGHEST))
    return np.float32(np.int32(bits).view(np.float32))


@inlined
def _first_zero(weight: Float32, block: int) -> np.float32:
    for j in range(weight.shape[1]):
        if weight[block, j] == _ZERO:
            return np.float32(weight[block, j])
    return _ZERO


@inlined
def spread(weight: Float32, block: int) -> tuple[np.float32, np.float32]:
    """Smallest and largest element; of equal zeros the first."""
    least, most = _HIGHEST, _LOWEST
    for j in range(weight.shape[1]):
        key = float_key(weight[block, j])
        least = key if key < least else least
        most = key if key > most else most
    low = _first_zero(weight, block) if _is_zero(least) else _from_key(least)
    high = _first_zero(weight, block) if _is_zero(most) else _from_key(most)
    return low, high


@inlined
def fifth_bit(level: np.int32, at: int) -> np.uint32:
    """Bit 4 of a level, moved to bit `at` of a word."""
    return np.uint32(np.uint32(np.uint32(level) >> np.uint32(4)) << np.uint32(at))


@inlined
def store_word(packed: Bytes, block: int, at: int, word: np.uint32) -> None:
    """Write 32 bits little-endian at byte `at` of a block."""
    for byte in range(4):
        packed[block, at + byte] = np.uint8(np.uint32(word >> np.uint32(8 * byte)))


@inlined
def load_word(packed: Bytes, block: int, at: int) -> np.uint32:
    """Read 32 bits little-endian at byte `at` of a block."""
    word = np.uint32(0)
    for byte in range(4):
        word |= np.uint32(np.uint32(packed[block, at + byte]) << np.uint32(8 * byte))
    return word
