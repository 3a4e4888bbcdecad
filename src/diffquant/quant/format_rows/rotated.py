"""ComfyUI's rotated integers: int8, 4 bits per row, 4 bits per block of 16 on an int8 grid.

The group of the rotation belongs to the format, since sizes and markers follow from it: 256, or the
largest power of 4 that divides the rows, by way of FALLBACKS.
"""

from __future__ import annotations

from collections.abc import Callable

from diffquant.quant.layout import (
    Part,
    QuantFormat,
    Requirement,
    Shape,
    matrix_shape,
    per_row,
    rows,
    same,
)

__all__ = ["ROWS"]

_GROUPS = {"": 256, "_64": 64, "_16": 16}


def _parts_of_row(per: int) -> Callable[[Shape], Shape]:
    def shape_of(shape: Shape) -> Shape:
        n, k = matrix_shape(shape)
        return n, k // per

    return shape_of


def _sixteen(_shape: Shape) -> Shape:
    return (16,)


def _rotated(
    name: str,
    suffix: str,
    parts: tuple[Part, ...],
    *,
    bits: float,
    block: int,
    error: float,
    source: str,
) -> QuantFormat:
    group = _GROUPS[suffix]
    return QuantFormat(
        name=name + suffix,
        codec=name,
        bits=bits,
        strategy="block" if block else "channel",
        block_size=block,
        requires=(Requirement("matrix", 2), Requirement("row", group)),
        parts=parts,
        gaussian_error=error,
        source=f"comfy_kitchen 0.2.40 {source}, rotated in groups of {group}",
        limited=False,
        rotation=group,
    )


_INT8 = (Part("weight", "I8", same), Part("scale", "F32", per_row))
_W4A4 = (Part("weight", "I8", _parts_of_row(2)), Part("scale", "F32", rows))
_W4A8 = (
    Part("weight", "I8", _parts_of_row(2)),
    Part("s_rel", "F8_E4M3", _parts_of_row(16)),
    Part("s_channel", "F32", rows),
    Part("codebook", "F32", _sixteen, per_row=False),
)

ROWS = (
    *(
        _rotated(
            "int8_convrot",
            suffix,
            _INT8,
            bits=8.0,
            block=0,
            error=0.00865,
            source="backends/eager/quantization.py:899-926",
        )
        for suffix in _GROUPS
    ),
    *(
        _rotated(
            "asym_w4a8_int8",
            suffix,
            _W4A8,
            bits=4.5,
            block=16,
            error=0.0731,
            source="backends/eager/w4a8_int8.py",
        )
        for suffix in _GROUPS
    ),
    *(  # its kernel wants rows of 64
        _rotated(
            "convrot_w4a4",
            suffix,
            _W4A4,
            bits=4.0,
            block=0,
            error=0.157,
            source="backends/eager/convrot_w4a4.py:108-165",
        )
        for suffix in ("", "_64")
    ),
)
