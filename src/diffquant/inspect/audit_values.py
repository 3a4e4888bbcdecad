"""Numbers that no block should hold: scales and weights that are not finite, codes without use.

Where a block keeps its scales is a table; `ggml_validate_row_data` (ggml-quants.c,
ggml-org/llama.cpp@01243c5) judges the same fields. Codes without use decode to something, and no
encoder writes them: they are a sign of damage, or of another program's idea of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.dtypes import STORAGE
from diffquant.core.tensors import ByteArray

__all__ = ["CODES", "not_finite", "unused_codes"]

Blocks = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# dtype -> (offset, kind) of every scale of a block; ggml-common.h of the same commit.
_SCALES: dict[str, tuple[tuple[int, str], ...]] = {
    "F64": ((0, "f64"),),
    "F32": ((0, "f32"),),
    "F16": ((0, "f16"),),
    "BF16": ((0, "bf16"),),
    "F8_E4M3": ((0, "e4m3"),),
    "F8_E5M2": ((0, "e5m2"),),
    "F8_E8M0": ((0, "e8m0"),),
    "Q4_0": ((0, "f16"),),
    "Q4_1": ((0, "f16"), (2, "f16")),
    "Q5_0": ((0, "f16"),),
    "Q5_1": ((0, "f16"), (2, "f16")),
    "Q8_0": ((0, "f16"),),
    "Q8_1": ((0, "f16"), (2, "f16")),
    "Q2_K": ((80, "f16"), (82, "f16")),
    "Q3_K": ((108, "f16"),),
    "Q4_K": ((0, "f16"), (2, "f16")),
    "Q5_K": ((0, "f16"), (2, "f16")),
    "Q6_K": ((208, "f16"),),
    "Q8_K": ((0, "f32"),),
    "IQ1_S": ((0, "f16"),),
    "IQ2_XXS": ((0, "f16"),),
    "IQ2_XS": ((0, "f16"),),
    "IQ2_S": ((0, "f16"),),
    "IQ3_XXS": ((0, "f16"),),
    "IQ3_S": ((0, "f16"),),
    "IQ4_NL": ((0, "f16"),),
    "IQ4_XS": ((0, "f16"),),
    "TQ1_0": ((52, "f16"),),
    "TQ2_0": ((64, "f16"),),
    "MXFP4": ((0, "e8m0"),),
    "Q1_0": ((0, "f16"),),
}


def _exponent_full(bits: NDArray[Any], mask: int) -> Mask:
    """Where every bit of the exponent is set: an infinity or a NaN."""
    return np.asarray((bits & bits.dtype.type(mask)) == mask)


_KINDS: dict[str, tuple[int, Callable[[Blocks], Mask]]] = {
    "f64": (8, lambda raw: _exponent_full(raw.view("<u8"), 0x7FF << 52)),
    "f32": (4, lambda raw: _exponent_full(raw.view("<u4"), 0x7F800000)),
    "f16": (2, lambda raw: _exponent_full(raw.view("<u2"), 0x7C00)),
    "bf16": (2, lambda raw: _exponent_full(raw.view("<u2"), 0x7F80)),
    "e4m3": (1, lambda raw: _exponent_full(raw, 0x7F)),
    "e5m2": (1, lambda raw: _exponent_full(raw, 0x7C)),
    "e8m0": (1, lambda raw: raw == 0xFF),
}


def not_finite(dtype: str, raw: ByteArray) -> int:
    """Count blocks (or plain numbers) with a NaN or an infinity where a float is.

    Args:
        dtype: STORAGE name; types without floats have none.
        raw: whole blocks.
    """
    blocks = raw.reshape(-1, STORAGE[dtype].block_nbytes)
    if dtype == "IQ1_M":
        return int(np.count_nonzero(_exponent_full(_iq1_m_scale(blocks), 0x7C00)))
    bad = np.zeros(len(blocks), np.bool_)
    for offset, kind in _SCALES.get(dtype, ()):
        width, check = _KINDS[kind]
        field = np.ascontiguousarray(blocks[:, offset : offset + width])
        bad |= check(field.reshape(-1))
    return int(np.count_nonzero(bad))


def _iq1_m_scale(blocks: Blocks) -> NDArray[np.uint16]:
    """The f16 that iq1_m spreads over the top nibbles of its four 16-bit scale words."""
    words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2") & np.uint16(0xF000)
    a, b, c, d = words.T
    out: NDArray[np.uint16] = np.bitwise_or(a >> 12, b >> 8) | (c >> 4) | d
    return out.astype(np.uint16)


def _ternary_bytes(digits: int, pad: int) -> NDArray[np.bool_]:
    """Which bytes the encoder of tq1_0 writes for `digits` base-3 digits."""
    numbers = np.arange(3**digits) * 3**pad
    found = np.zeros(256, np.bool_)
    found[(numbers * 256 + 242) // 243] = True
    return found


def _tq1_0(blocks: Blocks) -> Mask:
    five, four = _ternary_bytes(5, 0), _ternary_bytes(4, 1)
    return np.asarray(~(five[blocks[:, :48]].all(axis=1) & four[blocks[:, 48:52]].all(axis=1)))


def _tq2_0(blocks: Blocks) -> Mask:
    codes = blocks[:, :64]
    return np.asarray((codes & (codes >> 1) & 0x55).any(axis=1))  # both bits of a pair: code 3


def _q8_0(blocks: Blocks) -> Mask:
    return np.asarray((blocks[:, 2:] == 0x80).any(axis=1))


# dtype -> the codes it has, where not all are in use.
CODES: dict[str, str] = {
    "Q8_0": "levels from -127 to 127",
    "TQ1_0": "bytes of base-3 digits",
    "TQ2_0": "codes from 0 to 2",
}
_CODE_CHECKS: dict[str, Callable[[Blocks], Mask]] = {
    "Q8_0": _q8_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}


def unused_codes(dtype: str, raw: ByteArray) -> int:
    """Count blocks of a type in CODES that hold a code without use."""
    blocks = raw.reshape(-1, STORAGE[dtype].block_nbytes)
    return int(np.count_nonzero(_CODE_CHECKS[dtype](blocks)))
