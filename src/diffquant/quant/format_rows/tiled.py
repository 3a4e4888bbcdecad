"""Microscaling formats of ComfyUI: a small scale per block, scales stored in tiles of 128 by 4."""

from __future__ import annotations

from diffquant.quant.layout import Part, QuantFormat, Requirement, padded, scalar, tiles

__all__ = ["ROWS"]

ROWS = (
    QuantFormat(
        name="mxfp8",
        codec="mxfp8",
        bits=8.25,
        strategy="block",
        block_size=32,
        requires=(Requirement("matrix", 2),),
        parts=(Part("weight", "F8_E4M3", padded(32)), Part("block_scale", "U8", tiles(32))),
        gaussian_error=0.0265,
        source="comfy_kitchen 0.2.40 tensor/mxfp8.py, backends/eager/quantization.py:261-330",
        row_multiple_of=lambda _shape: 128,
        limited=False,
        padding=32,
    ),
    QuantFormat(
        name="nvfp4_comfy",
        codec="nvfp4_comfy",
        bits=4.5,
        strategy="block",
        block_size=16,
        requires=(Requirement("matrix", 2),),
        parts=(
            Part("weight", "U8", padded(16, per_byte=2)),
            Part("block_scale", "F8_E4M3", tiles(16)),
            Part("tensor_scale", "F32", scalar, per_row=False),
        ),
        gaussian_error=0.0951,
        source="comfy_kitchen 0.2.40 tensor/nvfp4.py, backends/eager/quantization.py:119-225",
        passes=2,
        row_multiple_of=lambda _shape: 128,
        limited=False,
        padding=16,
    ),
)
