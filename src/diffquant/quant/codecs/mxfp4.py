"""MXFP4 as ggml stores it: 32 weights, a power of two as scale, 4-bit floats.

    offset  0         1                17
            e (e8m0)  16 bytes of nibbles     decoded = 2**(e - 128) * VALUES[level]

The exponent is that of the largest magnitude, less two: floor(log2(amax)) - 2 + 127, where the
logarithm is rounded to float32 first (so an amax just below a power of two counts as that power),
and kept modulo 256 (so weights below 2**-125 get a huge scale and decode to zeros). Halfway
between two levels the smaller magnitude is taken. ComfyUI's mxfp4 is another layout.

Source: ggml-quants.c quantize_row_mxfp4_ref, best_index_mxfp4, dequantize_row_mxfp4,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.fp4 import E8M0_HALVES, MIDPOINTS, VALUES
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]


def _encode(blocks: Float32) -> Bytes:
    most = np.abs(blocks).max(axis=1, keepdims=True)  # (B, 1)
    # In float64 and rounded once: no float32 logarithm comes near a tie of that rounding.
    whole = fields.truncate(np.floor(np.log2(most.astype(np.float64)).astype(np.float32)))
    exponent = np.where(most > 0, whole + 125, 0).astype(np.uint8)
    scale = E8M0_HALVES[exponent]
    levels = np.zeros(blocks.shape, np.uint8)
    for midpoint in MIDPOINTS:
        levels += np.abs(blocks) > midpoint * scale
    levels |= ((blocks < 0) & (levels > 0)).astype(np.uint8) << np.uint8(3)
    return np.concatenate([exponent, fields.nibble_bytes(levels)], axis=1)


def _decode(packed: Bytes) -> Float32:
    return VALUES[fields.nibbles(packed[:, 1:])] * E8M0_HALVES[packed[:, :1]]


encode, decode = row_codec(_encode, _decode)
