"""What happens to tokens between two matrix products, one kernel each instead of five to fifteen.

Nothing here is computed much; everything is moved. Written with torch's own operations a norm of
queries in bfloat16 goes to float32 and back through seven passes over memory; here a value is read
once, kept in float32 in registers, and rounded once when it is written. So results differ from the
reference by its extra roundings: none in float32, an ulp or two in bfloat16.

A program takes whole rows: heads of `rotated_heads`, tokens of `modulated`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.runtime.kernels.triton.launch import launch

__all__ = ["modulated", "rotated_heads"]

_HEADS = 8  # heads a program takes
_WARPS = 4
_WIDE = 4096  # width from which a token gets more warps


@triton.jit
def _rotated_heads(
    x,
    scale,
    cos,
    sin,
    out,
    rows,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    table_batch,
    table_token,
    eps,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Norm and rotate ROWS heads of 2 * HALF values; heads of one token follow each other."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    at = tl.arange(0, 2 * HALF)
    start = batch * x_batch + token * x_token + head * x_head
    value = tl.load(x + start[:, None] + at[None, :], mask=inside[:, None], other=0.0)
    value = value.to(tl.float32)  # (ROWS, 2 HALF)
    square = tl.sum(value * value, axis=1) / (2 * HALF)
    value = value * tl.rsqrt(square + eps)[:, None]
    value = value * tl.load(scale + at).to(tl.float32)[None, :]

    pair = tl.arange(0, HALF)
    place = (batch * table_batch + token * table_token)[:, None] + pair[None, :]
    c = tl.load(cos + place, mask=inside[:, None], other=0.0)
    s = tl.load(sin + place, mask=inside[:, None], other=0.0)
    first, second = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
    turned = tl.join(first * c - second * s, first * s + second * c)  # (ROWS, HALF, 2)
    turned = tl.reshape(turned, (ROWS, 2 * HALF))
    start = batch * out_batch + token * out_token + head * out_head
    tl.store(
        out + start[:, None] + at[None, :], turned.to(out.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def _modulated(
    x,
    shift,
    scale,
    out,
    width,
    tokens,
    x_batch,
    x_token,
    shift_batch,
    shift_token,
    scale_batch,
    scale_token,
    eps,
    BLOCK: tl.constexpr,
):
    """Layer norm of one token of `width` values, then times 1 + scale, plus shift."""
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    batch = row // tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + batch * x_batch + token * x_token + at, mask=inside, other=0.0)
    value = value.to(tl.float32)
    mean = tl.sum(value, axis=0) / width
    value = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(value * value, axis=0) / width
    value = value * tl.rsqrt(variance + eps)
    more = tl.load(scale + batch * scale_batch + token * scale_token + at, mask=inside, other=0.0)
    moved = tl.load(shift + batch * shift_batch + token * shift_token + at, mask=inside, other=0.0)
    value = value * (1.0 + more.to(tl.float32)) + moved.to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=inside)


def rotated_heads(
    x: Tensor, scale: Tensor, positions: tuple[Tensor, Tensor], eps: float, out: Tensor
) -> None:
    """Root mean square norm of each head times `scale`, then rotary positions, into `out`.

    Args:
        x: (B, heads, L, head_dim), any strides but one for the last; head_dim a power of two.
        scale: (head_dim,).
        positions: cosines and sines, float32 (L, head_dim / 2) or (B or 1, 1, L, head_dim / 2).
        eps: of the norm.
        out: like x, of its own strides.
    """
    batch, heads, tokens, width = x.shape
    cos, sin = (table.reshape(-1, *table.shape[-2:]).contiguous() for table in positions)
    rows = batch * tokens * heads
    launch(
        _rotated_heads,
        triton.cdiv(rows, _HEADS),
        _WARPS,
        x,
        scale,
        cos,
        sin,
        out,
        rows,
        tokens,
        heads,
        x.stride(0),
        x.stride(2),
        x.stride(1),
        out.stride(0),
        out.stride(2),
        out.stride(1),
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        eps,
        HALF=width // 2,
        ROWS=_HEADS,
    )


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without parameters, times 1 + scale, plus shift.

    Args:
        x: (B, L, width), one stride for the last.
        shift: (B or 1, L or 1, width), one stride for the last.
        scale: like shift.
        eps: of the norm.

    Returns:
        (B, L, width), in one piece.
    """
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _modulated,
        batch * tokens,
        _WARPS if width < _WIDE else 2 * _WARPS,
        x,
        shift,
        scale,
        out,
        width,
        tokens,
        x.stride(0),
        x.stride(1),
        *_steps(shift),
        *_steps(scale),
        eps,
        BLOCK=triton.next_power_of_2(width),
    )
    return out


def _steps(command: Tensor) -> tuple[int, int]:
    """Strides over batch and tokens, 0 where one row serves all."""
    return tuple(command.stride(i) if command.shape[i] > 1 else 0 for i in (0, 1))  # type: ignore[return-value]
