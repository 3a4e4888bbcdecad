"""The eight magnitudes of 4-bit floats (e2m1) as ggml stores them: doubled, so all are integers.

A code is a sign bit above a 3-bit magnitude; the code of -0 decodes to 0 and is never written.
Scales are halved in turn. Source: ggml-common.h kvalues_mxfp4, ggml-impl.h
ggml_e8m0_to_fp32_half and ggml_ue4m3_to_fp32, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32

__all__ = ["E8M0_HALVES", "MIDPOINTS", "UE4M3_HALVES", "VALUES"]

_MAGNITUDES = np.array((0, 1, 2, 3, 4, 6, 8, 12), np.float32)
VALUES = np.concatenate([_MAGNITUDES, np.float32(0) - _MAGNITUDES])  # 0 - 0 is +0
MIDPOINTS = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / np.float32(2)


def _ue4m3() -> Float32:
    """Unsigned 8-bit floats: 4 exponent bits, 3 fraction bits; the sign bit is ignored."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction, -9), normal)
    values[0x7F] = 0  # NaN in the standard
    halves: Float32 = (values / 2).astype(np.float32)
    return halves


# Half of every scale byte: 2**(byte - 128), the smallest two subnormal; and unsigned e4m3.
E8M0_HALVES = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)
UE4M3_HALVES = _ue4m3()
