"""Rows of activations in 8 bits, and products of 8-bit rows: the torch reference.

A product in 8 bits is `y = (qx qw^T) * scale_x * scale_w + bias`. Weights come with their scales,
one per row or one for all; activations get theirs call by call, one per row (token). The order of
roundings is fixed, so that a fast kernel can be held to it::

    amax    largest absolute value of a row, in float32
    scale   amax / 448 (fp8 e4m3) or amax / 127 (int8), at least 2**-126; one IEEE division
    qx      x times 1 / scale (an IEEE division), cut to +-448 or +-127, rounded half to even
    y       sums of products of q (int8: exact), times scale_x, times scale_w, plus bias; rounded
            once to the dtype that was asked for

A row of zeros has q = 0. A row with a NaN or an infinity comes out as NaN: what overflowed is seen.

int8 formats that are rotated (ComfyUI's convrot) hold `w R`, R symmetric and its own inverse; so
`x w^T = (x R) (w R)^T`, and activations are rotated before they are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffquant.core.errors import UnsupportedShape
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.rotated import levels_of, rotated

__all__ = [
    "KINDS", "LEAST_SCALE", "Kind", "QuantizedRows", "RowKind", "levels", "multiply_rows",
    "quantize_rows",
]  # fmt: skip

LEAST_SCALE = 2.0**-126  # the smallest normal float32: cards flush what is below


@dataclass(frozen=True, slots=True)
class Kind:
    """Numbers of 8 bits that products are made of.

    Attributes:
        dtype: they are stored in.
        top: the largest.
        rowwise: number format of a weight in it with one scale per row.
    """

    dtype: torch.dtype
    top: float
    rowwise: str


KINDS: Mapping[str, Kind] = {
    "fp8": Kind(torch.float8_e4m3fn, 448.0, "fp8_e4m3_rowwise"),
    "int8": Kind(torch.int8, 127.0, "int8_rowwise"),
}


class RowKind(NamedTuple):
    """What a layer multiplies: a key of KINDS, and in groups of how many its rows are rotated."""

    kind: str
    rotation: int


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations that were quantized where they were made.

    Attributes:
        q: (M, K) in the kind's dtype.
        scale: (M, 1) float32.
        kind: what they are.
        shape: (..., K) of the activations, M rows.
        dtype: they would have; the layer's results are in it.
    """

    q: Tensor
    scale: Tensor
    kind: RowKind
    shape: tuple[int, ...]
    dtype: torch.dtype


def quantize_rows(x: Tensor, kind: str, *, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize every row with a scale of its own.

    Args:
        x: (M, K) float.
        kind: a key of KINDS.
        rotation: rotate groups of so many columns first; 0: none.

    Returns:
        q: (M, K) in the kind's dtype; scale: (M, 1) float32.

    Raises:
        UnsupportedShape: K is no multiple of `rotation`.
    """
    row, values = KINDS[kind], x.float()
    if rotation:
        if x.shape[1] % rotation:
            raise UnsupportedShape(
                f"rows of {x.shape[1]} cannot be rotated in groups of {rotation}"
            )
        values = rotated(values, rotation)
    amax = values.abs().amax(dim=1, keepdim=True)
    scale = (amax / row.top).clamp(min=LEAST_SCALE)  # clamp keeps NaN
    q = (values * (1.0 / scale)).clamp(-row.top, row.top)
    if not row.dtype.is_floating_point:
        q = q.nan_to_num(nan=0.0).round()  # the row's scale says that it was NaN
    return q.to(row.dtype), torch.where(amax.isfinite(), scale, torch.nan)


def multiply_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(a b^T) * a_scale * b_scale + bias`, rounded once.

    Args:
        a: (M, K) of a kind.
        a_scale: (M, 1) float32.
        b: (N, K) of the same kind.
        b_scale: (N, 1) or () float32.
        bias: (N,) or None.
        dtype: of the result.

    Returns:
        (M, N). Sums of int8 are exact; those of fp8 are float32's.
    """
    wide = torch.float64 if a.dtype == torch.int8 else torch.float32
    y = (a.to(wide) @ b.to(wide).T).float() * a_scale * b_scale.reshape(1, -1)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def levels(fmt: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The int8 levels (N, K) of a rotated weight of 4 bits: decoded = rotated(levels * scale)."""
    return levels_of(FORMATS[fmt].codec, parts, shape)
