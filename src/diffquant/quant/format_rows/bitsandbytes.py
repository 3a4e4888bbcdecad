"""bitsandbytes' formats: 4-bit blocks of the flattened weight, and int8 rows.

A block has 64 elements and keeps its largest magnitude, as a float or quantized itself.
"""

from __future__ import annotations

from diffquant.quant.layout import (
    Part,
    QuantFormat,
    Requirement,
    flat_blocks,
    halves,
    rows,
    rows_of_blocks,
    same,
    scalar,
)

__all__ = ["ROWS"]

_BLOCK, _NESTED = 64, 64 * 256  # weights per absmax, and per nested absmax


def _four_bits(name: str, codec: str, error: float, source: str) -> QuantFormat:
    return QuantFormat(
        name=name,
        codec=codec,
        bits=4.5,
        strategy="block",
        block_size=_BLOCK,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "U8", halves), Part("absmax", "F32", flat_blocks(_BLOCK))),
        gaussian_error=error,
        source=f"bitsandbytes 0.50.2 {source}, block 64 of the flattened weight",
        row_multiple_of=rows_of_blocks(_BLOCK),
        limited=False,
        flat_block=_BLOCK,
    )


def _double(name: str, error: float) -> QuantFormat:
    return QuantFormat(
        name=name,
        codec="double_quant",
        bits=4 + 8 / 64 + 32 / _NESTED,
        strategy="block",
        block_size=_BLOCK,
        requires=(Requirement("ndim", 2),),
        parts=(
            Part("weight", "U8", halves),
            Part("absmax", "U8", flat_blocks(_BLOCK)),
            Part("nested_absmax", "F32", flat_blocks(_NESTED)),
            Part("nested_offset", "F32", scalar, per_row=False),
        ),
        gaussian_error=error,
        source="bitsandbytes 0.50.2 functional.py:938-952, absmax of 256 blocks in 8 bits",
        passes=2,
        statistic="mean",
        row_multiple_of=rows_of_blocks(_NESTED),
        limited=False,
        flat_block=_NESTED,
    )


ROWS = (
    _four_bits("nf4", "nf4", 0.092, "functional.py:788-805"),
    _double("nf4_dq", 0.092),
    _four_bits("fp4", "fp4_bnb", 0.122, "functional.py:806-823"),
    _double("fp4_dq", 0.122),
    QuantFormat(
        name="int8_bnb",
        codec="int8_bnb",
        bits=8.0,
        strategy="channel",
        block_size=0,
        requires=(Requirement("matrix", 2),),
        parts=(Part("weight", "I8", same), Part("scb", "F32", rows)),
        gaussian_error=0.0087,
        source="bitsandbytes 0.50.2 backends/default/ops.py:142-177, absmax(row) / 127",
        limited=False,
    ),
)
