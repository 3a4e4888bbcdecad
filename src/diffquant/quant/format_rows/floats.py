"""Plain floating point, and 8-bit floats: alone, with a scale per tensor, row or 128-block."""

from __future__ import annotations

from diffquant.core.dtypes import STORAGE
from diffquant.quant.layout import (
    Part,
    QuantFormat,
    Requirement,
    blocks128,
    rows,
    same,
    scalar,
)

__all__ = ["ROWS"]

_CONVERT_TO_QUANT = "silveroxides/convert_to_quant@0e2909e utils/comfy_quant.py"


def _cast(name: str, error: float, *, limited: bool, largest: float = 32768.0) -> QuantFormat:
    part = Part("weight", name.upper(), same)
    bits = STORAGE[name.upper()].block_nbytes * 8.0
    return QuantFormat(
        name,
        "cast",
        bits,
        "none",
        0,
        (),
        (part,),
        error,
        "IEEE 754 / bfloat16",
        limited=limited,
        safe_amax=largest,
    )


def _fp8(name: str, dtype: str, error: float, largest: float, what: str) -> QuantFormat:
    return QuantFormat(
        name=name,
        codec=name,
        bits=8.0,
        strategy="none",
        block_size=0,
        requires=(),
        parts=(Part("weight", dtype, same),),
        gaussian_error=error,
        source=f"OCP 8-bit floating point, {what}, largest finite {largest:g}, half to even",
        safe_amax=largest,
    )


def _scaled(name: str, dtype: str, error: float, largest: float) -> QuantFormat:
    return QuantFormat(
        name=name,
        codec=name,
        bits=8.0,
        strategy="tensor",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", dtype, same), Part("scale", "F32", scalar, per_row=False)),
        gaussian_error=error,
        source=f"scale = amax / {largest:g}, decoded = qdata * scale; comfy_kitchen 0.2.40 "
        "tensor/fp8.py",
        passes=2,
        limited=False,
    )


ROWS = (
    _cast("f32", 0.0, limited=False),
    _cast("f16", 2.07e-4, limited=True, largest=65504.0),
    _cast("bf16", 1.66e-3, limited=False),
    _fp8("fp8_e4m3", "F8_E4M3", 0.0330, 448.0, "e4m3fn: no infinities"),
    _scaled("fp8_e4m3_scaled", "F8_E4M3", 0.0265, 448.0),
    _fp8("fp8_e5m2", "F8_E5M2", 0.0528, 57344.0, "e5m2: infinities"),
    _scaled("fp8_e5m2_scaled", "F8_E5M2", 0.0528, 57344.0),
    QuantFormat(
        name="fp8_e4m3_rowwise",
        codec="fp8_e4m3_rowwise",
        bits=8.0,
        strategy="channel",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "F8_E4M3", same), Part("scale", "F32", rows)),
        gaussian_error=0.0265,
        source=f"scale = amax(row) / 448; {_CONVERT_TO_QUANT}",
        limited=False,
    ),
    QuantFormat(
        name="fp8_e4m3_blockwise",
        codec="blocks_128",
        bits=8.0,
        strategy="block",
        block_size=128,
        requires=(Requirement("matrix", 2), Requirement("row", 128), Requirement("rows", 128)),
        parts=(Part("weight", "F8_E4M3", same), Part("block_scale", "F32", blocks128)),
        gaussian_error=0.0265,
        source=f"blocks of 128 x 128; {_CONVERT_TO_QUANT}",
        row_multiple_of=lambda _shape: 128,
        limited=False,
    ),
)
