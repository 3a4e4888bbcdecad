"""Fast twin of codecs/nvfp4.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.fp4 import UE4M3_HALVES, VALUES
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import kernel

__all__ = ["decode"]

_SCALES = UE4M3_HALVES
_VALUES = VALUES


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        for s in range(4):
            scale = _SCALES[packed[b, s]]
            for i in range(8):
                byte = packed[b, 4 + 8 * s + i]
                weight[b, 16 * s + i] = scale * _VALUES[byte & np.uint8(15)]
                weight[b, 16 * s + 8 + i] = scale * _VALUES[byte >> np.uint8(4)]


_, decode = row_codec(None, blocks.decoder(_decode_kernel, 64))
