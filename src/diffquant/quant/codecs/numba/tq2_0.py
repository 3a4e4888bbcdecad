"""Fast twin of codecs/tq2_0.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import kernel

__all__ = ["decode"]

_ONE = np.int32(1)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        d = blocks.load_half(packed, b, 64)
        for half in range(2):
            for n in range(4):
                for i in range(32):
                    byte = np.int32(packed[b, 32 * half + i])
                    level = np.int32(np.int32(byte >> np.int32(2 * n)) & np.int32(3))
                    value = np.float32(np.int32(level - _ONE))
                    weight[b, 128 * half + 32 * n + i] = d * value


_, decode = row_codec(None, blocks.decoder(_decode_kernel, 256))
