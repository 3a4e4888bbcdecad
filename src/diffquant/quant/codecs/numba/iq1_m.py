"""Fast twin of codecs/iq1_m.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq1_s import SHIFT
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import float_from_half

__all__ = ["decode"]

_SHIFT = SHIFT
_ONE = np.float32(1)
_TWO = np.float32(2)
_SCALES_AT = 48


@inlined
def _load_scale(packed: Bytes, b: int) -> np.float32:
    """Gather the float16 whose nibbles are the upper ones of four words."""
    bits = np.uint16(0)
    for n in range(4):
        nibble = np.uint16(packed[b, _SCALES_AT + 2 * n + 1] >> np.uint8(4))
        bits = np.uint16(bits | np.uint16(nibble << np.uint16(4 * n)))
    return np.float32(float_from_half(bits))


@kernel
def _decode_kernel(packed: Bytes, weight: Float32, table: Float32) -> None:
    for b in range(packed.shape[0]):
        d = _load_scale(packed, b)
        for s in range(16):
            word = blocks.load_short(packed, b, _SCALES_AT + 2 * (s // 4))
            step = np.float32(np.int32((word >> np.int32(3 * (s % 4))) & np.int32(7)))
            scale = np.float32(d * np.float32(_TWO * step + _ONE))
            for v in range(2):
                nibble = np.int32(packed[b, 32 + s]) >> np.int32(4 * v)
                upper = np.int32((nibble & np.int32(7)) << np.int32(8))
                index = np.int32(np.int32(packed[b, 2 * s + v]) | upper)
                shift = -_SHIFT if nibble & np.int32(8) else _SHIFT
                for i in range(8):
                    weight[b, 16 * s + 8 * v + i] = scale * np.float32(table[index, i] + shift)


def _decode(packed: Bytes, weight: Float32) -> None:
    _decode_kernel(packed, weight, grid("iq1_m"))


_, decode = row_codec(None, blocks.decoder(_decode, 256))
