"""TQ1_0: 256 weights of -1, 0 or 1 times one half-precision scale; 1.6875 bits.

    offset  0                        32                       48                     52
            32 bytes of five digits  16 bytes of five digits  4 bytes of four digits d (f16)

A byte holds base-3 digits as a fraction of 256: digit n is the whole part of 3 * (byte * 3**n
modulo 256) / 256. Digit n of byte i of a run of w bytes is weight w n + i of that run's weights.
decoded = d * (digit - 1).

Read, not written. Source: ggml-common.h block_tq1_0, ggml-quants.c dequantize_row_tq1_0,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["RUNS", "decode"]

RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # first byte, bytes, digits of a byte
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _decode(packed: Bytes) -> Float32:
    digits = []
    for start, width, count in RUNS:
        fractions = packed[:, None, start : start + width] * _POWERS[:count]  # modulo 256
        digits.append((fractions.astype(np.uint16) * 3 >> 8).reshape(len(packed), -1))
    levels = np.concatenate(digits, axis=1).astype(np.float32) - np.float32(1)
    return fields.halves(packed[:, 52:]) * levels


_, decode = row_codec(None, _decode)
