"""8-bit integers: one scale per tensor, per row, per block of 128 x 128."""

from __future__ import annotations

from diffquant.quant.layout import (
    Part,
    QuantFormat,
    Requirement,
    blocks128,
    per_row,
    same,
    scalar,
)

__all__ = ["ROWS"]

_COMFY_INT8 = "half to even; comfy_kitchen 0.2.40 tensor/int8.py"

ROWS = (
    QuantFormat(
        name="int8_tensor",
        codec="int8_tensor",
        bits=8.0,
        strategy="tensor",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "I8", same), Part("scale", "F32", scalar, per_row=False)),
        gaussian_error=0.0109,
        source=f"scale = amax / 127, {_COMFY_INT8}",
        passes=2,
        limited=False,
    ),
    QuantFormat(
        name="int8_rowwise",
        codec="int8_rowwise",
        bits=8.0,
        strategy="channel",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "I8", same), Part("scale", "F32", per_row)),
        gaussian_error=0.0087,
        source=f"scale = absmax(row) / 127, {_COMFY_INT8}",
        limited=False,
    ),
    QuantFormat(
        name="int8_blockwise",
        codec="blocks_128",
        bits=8.0,
        strategy="block",
        block_size=128,
        requires=(Requirement("matrix", 2), Requirement("row", 128), Requirement("rows", 128)),
        parts=(Part("weight", "I8", same), Part("block_scale", "F32", blocks128)),
        gaussian_error=0.0090,
        source="blocks of 128 x 128; silveroxides/convert_to_quant@0e2909e utils/comfy_quant.py",
        row_multiple_of=lambda _shape: 128,
        limited=False,
    ),
)
