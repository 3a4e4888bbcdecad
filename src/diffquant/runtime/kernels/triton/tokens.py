"""What happens to tokens between two matrix products, one kernel each instead of five to fifteen.

Nothing here is computed much; everything is moved. Written with torch's own operations a norm of
queries in bfloat16 goes to float32 and back through seven passes over memory; here a value is read
once, kept in float32 in registers, and rounded once when it is written. So results differ from the
reference by its extra roundings: none in float32, an ulp or two in bfloat16.

A program takes whole rows, heads of `rotated_heads` or tokens of `modulated`, or a piece of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.runtime.kernels.triton.launch import launch, steps
from diffquant.runtime.kernels.triton.rows import exact_gelu, gelu

__all__ = ["gelu_behind", "gelu_gated", "modulated", "rotated_heads"]

_HEADS = 8  # heads a program takes
_WARPS = 4
_WIDE = 4096  # width from which a token gets more warps
_CHUNK = 2048  # values of a program of `gelu_behind`


@triton.jit
def _rotated_heads(
    q,
    k,
    v,
    q_scale,
    k_scale,
    cos,
    sin,
    q_out,
    k_out,
    v_out,
    programs,  # for each of q, k, v
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
    q_eps,
    k_eps,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Norm and rotate ROWS heads of 2 * HALF values of q or k; heads of a token follow each other.

    Those of v, where there are programs for them, are moved.
    """
    part = tl.program_id(0) // programs
    row = (tl.program_id(0) % programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    at = tl.arange(0, 2 * HALF)
    start = batch * x_batch + token * x_token + head * x_head
    place = start[:, None] + at[None, :]
    end = (batch * out_batch + token * out_token + head * out_head)[:, None] + at[None, :]
    if part == 2:
        tl.store(v_out + end, tl.load(v + place, mask=inside[:, None]), mask=inside[:, None])
    else:
        x, scale, out, eps = q, q_scale, q_out, q_eps
        if part == 1:
            x, scale, out, eps = k, k_scale, k_out, k_eps
        value = tl.load(x + place, mask=inside[:, None], other=0.0)
        value = value.to(tl.float32)  # (ROWS, 2 HALF)
        square = tl.sum(value * value, axis=1) / (2 * HALF)
        value = value * tl.rsqrt(square + eps)[:, None]
        value = value * tl.load(scale + at).to(tl.float32)[None, :]
        pair = tl.arange(0, HALF)
        angle = (batch * table_batch + token * table_token)[:, None] + pair[None, :]
        c = tl.load(cos + angle, mask=inside[:, None], other=0.0)
        s = tl.load(sin + angle, mask=inside[:, None], other=0.0)
        first, second = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
        turned = tl.join(first * c - second * s, first * s + second * c)  # (ROWS, HALF, 2)
        turned = tl.reshape(turned, (ROWS, 2 * HALF))
        tl.store(out + end, turned.to(q_out.dtype.element_ty), mask=inside[:, None])


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


@triton.jit
def _gelu_behind(
    first,
    x,
    out,
    width,  # of first
    columns,
    tokens,
    first_batch,
    first_token,
    x_batch,
    x_token,
    chunks,
    CHUNK: tl.constexpr,
):
    """A chunk of a token of `columns`: those of `first`, and behind them GELU of x."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    token, batch = row % tokens, row // tokens
    first += batch * first_batch + token * first_token
    x += batch * x_batch + token * x_token
    value = tl.load(first + column, mask=column < width, other=0.0).to(tl.float32)
    inside = column < columns
    active = tl.load(x + column - width, mask=inside & (column >= width), other=0.0)
    value += gelu(active.to(tl.float32))
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_gated(
    x,
    gate,
    out,
    columns,
    tokens,
    x_batch,
    x_token,
    gate_batch,
    gate_token,
    chunks,
    CHUNK: tl.constexpr,
):
    """A chunk of a token: x times GELU, by erf, of the gate."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    token, batch = row % tokens, row // tokens
    inside = column < columns
    value = tl.load(x + batch * x_batch + token * x_token + column, mask=inside, other=0.0)
    active = tl.load(
        gate + batch * gate_batch + token * gate_token + column, mask=inside, other=0.0
    )
    value = value.to(tl.float32) * exact_gelu(active.to(tl.float32))
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


def rotated_heads(
    x: tuple[Tensor, Tensor, Tensor | None],
    scales: tuple[Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
    eps: tuple[float, float],
    out: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Root mean square norm of each head of q and k times `scale`, then rotary positions.

    Args:
        x: q, k and, where it is to be moved, v: (B, heads, L, head_dim) of the same strides, one
            for the last; head_dim a power of two.
        scales: (head_dim,) each, of q and k.
        positions: cosines and sines, float32 (L, head_dim / 2) or (B or 1, 1, L, head_dim / 2).
        eps: of the norms.
        out: where they go; of the same strides.
    """
    q, k, v = x
    batch, heads, tokens, width = q.shape
    cos, sin = (table.reshape(-1, *table.shape[-2:]).contiguous() for table in positions)
    rows = batch * tokens * heads
    programs = triton.cdiv(rows, _HEADS)
    launch(
        _rotated_heads,
        programs * (2 if v is None else 3),
        _WARPS,
        q,
        k,
        q if v is None else v,
        *scales,
        cos,
        sin,
        out[0],
        out[1],
        out[0] if out[2] is None else out[2],
        programs,
        rows,
        tokens,
        heads,
        q.stride(0),
        q.stride(2),
        q.stride(1),
        out[0].stride(0),
        out[0].stride(2),
        out[0].stride(1),
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        *eps,
        HALF=width // 2,
        ROWS=_HEADS,
    )


def gelu_behind(first: Tensor, x: Tensor) -> Tensor:
    """`first` (B, L, W) and, behind it, GELU by tanh of `x` (B, L, K); one stride for the last.

    Returns:
        (B, L, W + K), in one piece.
    """
    batch, tokens, width = first.shape
    columns = width + x.shape[2]
    out = torch.empty((batch, tokens, columns), dtype=x.dtype, device=x.device)
    chunks = triton.cdiv(columns, _CHUNK)
    launch(
        _gelu_behind,
        batch * tokens * chunks,
        _WARPS,
        first,
        x,
        out,
        width,
        columns,
        tokens,
        *first.stride()[:2],
        *x.stride()[:2],
        chunks,
        CHUNK=_CHUNK,
    )
    return out


def gelu_gated(x: Tensor, gate: Tensor) -> Tensor:
    """`x` times GELU, by erf, of `gate`: (B, L, K) each, one stride for the last.

    Returns:
        (B, L, K), in one piece.
    """
    batch, tokens, columns = x.shape
    out = torch.empty((batch, tokens, columns), dtype=x.dtype, device=x.device)
    chunk = min(_CHUNK, triton.next_power_of_2(columns))
    chunks = triton.cdiv(columns, chunk)
    launch(
        _gelu_gated,
        batch * tokens * chunks,
        _WARPS,
        x,
        gate,
        out,
        columns,
        tokens,
        *x.stride()[:2],
        *gate.stride()[:2],
        chunks,
        CHUNK=chunk,
    )
    return out


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
        *steps(shift),
        *steps(scale),
        eps,
        BLOCK=triton.next_power_of_2(width),
    )
    return out
