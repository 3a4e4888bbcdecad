"""ggml's block types: a weight's last dimension is cut into blocks that hold their own scales."""

from __future__ import annotations

from diffquant.core.dtypes import STORAGE
from diffquant.quant.layout import Importance, Part, QuantFormat, Requirement, same

__all__ = ["ROWS"]


def _ggml(
    name: str,
    error: float,
    *,
    importance: Importance = "unused",
    encodes: bool = True,
    limited: bool = True,
) -> QuantFormat:
    row = STORAGE[name.upper()]
    written = f"quantize_row_{name}_ref; with importance quantize_{name}"
    return QuantFormat(
        name=name,
        codec=name,
        bits=row.block_nbytes * 8 / row.block_size,
        strategy="block",
        block_size=row.block_size,
        requires=(Requirement("ndim", 2), Requirement("last_dim", row.block_size)),
        parts=(Part("weight", row.name, same),),
        gaussian_error=error,
        source=f"ggml ggml-quants.c {written if encodes else f'dequantize_row_{name}'}",
        importance=importance,
        encodes=encodes,
        limited=limited,
    )


ROWS = (
    _ggml("q4_0", 0.0859, importance="optional"),
    _ggml("q4_1", 0.0782, importance="optional"),
    _ggml("q5_0", 0.0427, importance="optional"),
    _ggml("q5_1", 0.0379, importance="optional"),
    _ggml("q8_0", 0.00535),
    _ggml("q2_k", 0.297, importance="optional"),
    _ggml("q3_k", 0.151, importance="optional"),
    _ggml("q4_k", 0.0713, importance="optional"),
    _ggml("q5_k", 0.0361, importance="optional"),
    _ggml("q6_k", 0.0177, importance="optional"),
    _ggml("iq4_nl", 0.0761, importance="optional"),
    _ggml("iq4_xs", 0.0767, importance="optional"),
    _ggml("mxfp4", 0.114, limited=False),
    _ggml("iq1_s", 0.0, encodes=False),
    _ggml("iq1_m", 0.0, encodes=False),
    _ggml("tq1_0", 0.0, encodes=False),
    _ggml("tq2_0", 0.0, encodes=False),
    _ggml("nvfp4", 0.0, encodes=False),
    _ggml("iq3_s", 0.166, importance="optional"),
    _ggml("iq3_xxs", 0.213, importance="optional"),
    _ggml("iq2_s", 0.265, importance="optional"),
    _ggml("iq2_xs", 0.299, importance="required"),
    _ggml("iq2_xxs", 0.344, importance="required"),
)
