"""LEVELS: a number format as a table of values under scales, which is all that rounding needs.

A stored number is `values[i] * scale`. What differs between formats is who shares a scale, which
scales can be stored, and how codes and scales lie in the parts; a row of LEVELS says the first two,
packing.py does the third. Formats without a row (ggml's block types have scale searches of their
own; plain casts have no scale) are rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.asym_w4a8_int8 import CODEBOOK
from diffquant.quant.codecs.fp4_bnb import CODE as FP4
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.fp8_e5m2 import e5m2_table
from diffquant.quant.codecs.nf4 import CODE as NF4
from diffquant.quant.codecs.nvfp4_comfy import VALUES as E2M1

__all__ = ["LEVELS", "Levels", "Run", "Scales"]

Run = Literal["flat", "padded", "row", "fixed"]
Scales = Literal["any", "e4m3", "powers", "fixed"]


@dataclass(frozen=True, slots=True)
class Levels:
    """A format as rounding sees it.

    Attributes:
        values: ascending, no two alike, finite.
        codes: as which byte each is stored.
        run: who shares a scale: `block` elements of the flattened weight, of a row that is padded
            to whole blocks, a row, or what the plain encoder decides.
        block: elements that share a scale; 0 for a row, and where scales stay as they are.
        scales: which scales can be stored: any float32, an E4M3 number times the tensor's scale,
            powers of two, or only the plain encoder's.
        largest: the value that the plain encoder gives to a block's largest magnitude.
    """

    values: Float32
    codes: Bytes
    run: Run
    block: int
    scales: Scales
    largest: float

    @property
    def bounds(self) -> Float32:
        """Between which neighbours a number is rounded up or down: (V - 1,)."""
        return (self.values[:-1] + self.values[1:]) / np.float32(2)

    @property
    def searches(self) -> bool:
        """Whether its scales can be chosen."""
        return self.scales != "fixed"


def _table(values: NDArray[np.float32]) -> tuple[Float32, Bytes]:
    """Finite values in ascending order and their codes; of equal ones, the first code."""
    code = np.arange(values.size)
    code = code[np.isfinite(values)]
    found, first = np.unique(values[code] + np.float32(0), return_index=True)
    return found.astype(np.float32), code[first].astype(np.uint8)


def _int8() -> tuple[Float32, Bytes]:
    level = np.arange(-127, 128)
    return level.astype(np.float32), level.astype(np.int8).view(np.uint8)


def _row(
    table: tuple[Float32, Bytes], run: Run, block: int, scales: Scales, largest: float
) -> Levels:
    return Levels(*table, run, block, scales, largest)


def _int4() -> tuple[Float32, Bytes]:
    level = np.arange(-7, 8)
    return level.astype(np.float32), (level & 15).astype(np.uint8)


_E4M3, _E5M2 = _table(e4m3_table()), _table(e5m2_table())
_INT8, _INT4 = _int8(), _int4()

LEVELS: Mapping[str, Levels] = {
    "nf4": _row(_table(NF4), "flat", 64, "any", 1.0),
    "nf4_dq": _row(_table(NF4), "flat", 64, "any", 1.0),
    "fp4": _row(_table(FP4), "flat", 64, "any", 1.0),
    "fp4_dq": _row(_table(FP4), "flat", 64, "any", 1.0),
    "nvfp4_comfy": _row(_table(E2M1), "padded", 16, "e4m3", 6.0),
    "mxfp8": _row(_E4M3, "padded", 32, "powers", 448.0),
    "fp8_e4m3_rowwise": _row(_E4M3, "row", 0, "any", 448.0),
    "int8_rowwise": _row(_INT8, "row", 0, "any", 127.0),
    "int8_bnb": _row(_INT8, "row", 0, "any", 127.0),
    **{
        name: _row(_INT8, "row", 0, "any", 127.0)
        for name in ("int8_convrot", "int8_convrot_64", "int8_convrot_16")
    },
    **{name: _row(_INT4, "row", 0, "any", 7.0) for name in ("convrot_w4a4", "convrot_w4a4_64")},
    **{
        # What decodes lies on an int8 grid besides, whose error is small and not carried on.
        name: _row(_table(CODEBOOK), "fixed", 0, "fixed", 0.980671)
        for name in ("asym_w4a8_int8", "asym_w4a8_int8_64", "asym_w4a8_int8_16")
    },
    "fp8_e4m3_scaled": _row(_E4M3, "fixed", 0, "fixed", 448.0),
    "fp8_e5m2_scaled": _row(_E5M2, "fixed", 0, "fixed", 57344.0),
    "fp8_e4m3_blockwise": _row(_E4M3, "fixed", 0, "fixed", 448.0),
    "int8_tensor": _row(_INT8, "fixed", 0, "fixed", 127.0),
    "int8_blockwise": _row(_INT8, "fixed", 0, "fixed", 127.0),
}
