"""bitsandbytes' formats: blocks of the flattened weight, each with its largest magnitude."""

from __future__ import annotations

from diffquant.quant.layout import (
    Part,
    QuantFormat,
    Requirement,
    flat_blocks,
    halves,
    rows_of_blocks,
)

__all__ = ["ROWS"]

ROWS = (
    QuantFormat(
        name="nf4",
        codec="nf4",
        bits=4.5,
        strategy="block",
        block_size=64,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "U8", halves), Part("absmax", "F32", flat_blocks(64))),
        gaussian_error=0.092,
        source="bitsandbytes 0.50.2 functional.py:788-805, block 64 of the flattened weight",
        row_multiple_of=rows_of_blocks(64),
        limited=False,
        flat_block=64,
    ),
)
