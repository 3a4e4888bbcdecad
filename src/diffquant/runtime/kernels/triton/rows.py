"""Rows of activations in 8 bits, with a scale per row: one kernel reads them once; see rows.py.

A program takes one row and holds it in registers, chunk by chunk, in the dtype that the result
would have; or it reads the row twice, the second time from the card's cache. Which of WAYS pays is
way_for's: benchmarks/gpu_matmul.py --parts fused tries all. What comes before may be part of the
kernel, so that its result is never in memory:

    plain       nothing
    modulated   a layer norm, times 1 + scale, plus shift
    normed      a layer norm, times scale, plus shift
    activated   GELU, by tanh, of one tensor, behind another that stays as it is
    gated       one tensor times GELU, by erf, of another
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.runtime.kernels.rows import KINDS, LEAST_SCALE
from diffquant.runtime.kernels.rows import quantize_rows as reference
from diffquant.runtime.kernels.triton.bits import to_e4m3
from diffquant.runtime.kernels.triton.launch import aligned, launch, steps
from diffquant.runtime.kernels.triton.rotated import rounded
from diffquant.runtime.kernels.triton.turned import turned

__all__ = [
    "WAYS", "Way", "activated_rows", "exact_gelu", "gated_rows", "gelu", "modulated_rows",
    "normed_rows", "quantize_rows", "serves", "way_for",
]  # fmt: skip

_WIDEST = 16384
_ROTATIONS = (16, 64, 256)
_VALUES = 8  # of a thread in a chunk: 16 bytes of bfloat16
_CONVERTS = (8, 9)  # capability from which a card rounds to float8 itself


@triton.jit
def gelu(x):
    """By tanh, of float32: x / (1 + exp(-2 u)), which is 0 where the exponential is infinite."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def exact_gelu(x):
    """By erf, of float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _scale(amax, TOP: tl.constexpr, LEAST: tl.constexpr):
    return tl.maximum(tl.div_rn(amax, TOP), LEAST)


@triton.jit
def _codes(x, inverse, TOP: tl.constexpr, INT: tl.constexpr, CARD: tl.constexpr):
    """What is stored: int8, or a float8 e4m3, as bits where the card does not round to it."""
    q = tl.maximum(tl.minimum(x * inverse, TOP), -TOP)  # the scale says where one was NaN
    if INT:
        codes = rounded(tl.where(q == q, q, 0.0)).to(tl.int8)
    elif CARD:
        codes = q.to(tl.float8e4nv)
    else:
        codes = to_e4m3(q)
    return codes


@triton.jit
def _kept(amax, scale):
    """The scale of a row; NaN if something in it is not finite (an infinite amax, or NaN)."""
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def _magnitude(x):
    """Absolute values, NaN as infinity: `tl.max` may pass over NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _long_rows(
    src,
    dst,
    scales,
    columns,
    stride,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    INT: tl.constexpr,
    CARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    src += row * stride
    dst += row * columns
    column = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        mask = column < columns - start
        x = tl.load(src + start + column, mask=mask, other=0).to(tl.float32)
        most = tl.maximum(most, _magnitude(x))
    amax = tl.max(most, axis=0)
    scale = _scale(amax, TOP, LEAST)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, columns, BLOCK):
        mask = column < columns - start
        x = tl.load(src + start + column, mask=mask, other=0).to(tl.float32)
        tl.store(dst + start + column, _codes(x, inverse, TOP, INT, CARD), mask=mask)
    tl.store(scales + row, _kept(amax, scale))


@triton.jit
def _normed(values, columns, eps, CHUNK: tl.constexpr):
    """Layer norm of a row that is held in chunks; what is beyond its end comes out as anything."""
    total = tl.sum(values[0], axis=0)
    for i in tl.static_range(1, len(values)):
        total += tl.sum(values[i], axis=0)
    mean = total / columns
    at = tl.arange(0, CHUNK)
    centred = ()
    square = 0.0
    for i in tl.static_range(len(values)):
        value = tl.where(i * CHUNK + at < columns, values[i] - mean, 0.0)
        square += tl.sum(value * value, axis=0)
        centred = centred + (value,)
    factor = tl.rsqrt(square / columns + eps)
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (centred[i] * factor,)
    return found


@triton.jit
def _loaded(x, more, column, first, columns, BEFORE: tl.constexpr):
    """Columns of a row in float32, activated where they are to be."""
    if BEFORE == "activated":
        value = tl.load(x + column, mask=column < first, other=0).to(tl.float32)
        mask = (column >= first) & (column < columns)
        value += gelu(tl.load(more + column - first, mask=mask, other=0).to(tl.float32))
    elif BEFORE == "gated":
        mask = column < columns
        value = tl.load(x + column, mask=mask, other=0).to(tl.float32)
        value *= exact_gelu(tl.load(more + column, mask=mask, other=0).to(tl.float32))
    else:
        value = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
    return value


@triton.jit
def _rows(
    x,
    more,
    shift,
    scale,
    dst,
    scales,
    columns,
    first,  # columns of x that `activated` copies
    tokens,
    x_batch,
    x_token,
    more_batch,
    more_token,
    shift_batch,
    shift_token,
    scale_batch,
    scale_token,
    eps,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    INT: tl.constexpr,
    CARD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    CORES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, batch = row % tokens, row // tokens
    x += batch * x_batch + token * x_token
    more += batch * more_batch + token * more_token
    dst += row * columns
    at = tl.arange(0, CHUNK)
    values = ()
    most = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        value = _loaded(x, more, i * CHUNK + at, first, columns, BEFORE)
        if HELD and (SIZE or BEFORE == "modulated" or BEFORE == "normed"):
            values = values + (value,)
        elif HELD:
            values = values + (value.to(x.dtype.element_ty),)
        else:
            most = tl.maximum(most, _magnitude(value))
    if BEFORE == "modulated" or BEFORE == "normed":
        values = _normed(values, columns, eps, CHUNK)
        shift += batch * shift_batch + token * shift_token
        scale += batch * scale_batch + token * scale_token
        done = ()
        for i in tl.static_range(CHUNKS):
            column = i * CHUNK + at
            factor = tl.load(scale + column, mask=column < columns, other=0).to(tl.float32)
            moved = tl.load(shift + column, mask=column < columns, other=0).to(tl.float32)
            if BEFORE == "modulated":
                factor += 1.0
            done = done + (values[i] * factor + moved,)
        values = done
    if SIZE:
        done = ()
        for i in tl.static_range(CHUNKS):
            done = done + (turned(values[i], CHUNK, SIZE, CORES),)
        values = done
    if HELD:
        for i in tl.static_range(CHUNKS):
            most = tl.maximum(most, _magnitude(values[i].to(tl.float32)))
    amax = tl.max(most, axis=0)
    size = _scale(amax, TOP, LEAST)
    inverse = tl.div_rn(1.0, size)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + at
        if HELD:
            value = values[i].to(tl.float32)
        else:
            value = _loaded(x, more, column, first, columns, BEFORE)
        tl.store(dst + column, _codes(value, inverse, TOP, INT, CARD), mask=column < columns)
    tl.store(scales + row, _kept(amax, size))


def serves(columns: int, rotation: int) -> bool:
    """Whether rows of so many columns are held by a program."""
    if columns > _WIDEST or columns < 1:
        return False
    return not rotation or (columns % rotation == 0 and rotation in _ROTATIONS)


class Way(NamedTuple):
    """How a program takes a row: its warps, and whether it holds the row in registers."""

    warps: int
    held: bool = True


WAYS = tuple(Way(warps, held) for warps in (4, 8, 16) for held in (True, False))


def way_for(before: str, columns: int, rotation: int) -> Way:
    """The way for rows of so many columns: what was fastest on an H100, of 4608 rows."""
    if before == "plain" and not rotation:
        return Way(4 if columns <= 4096 else 16, held=False)
    if rotation or before == "activated":
        return Way(4 if columns <= 4096 else 8)
    return Way(4 if columns <= 6144 else 8 if columns <= 8192 else 16)


@functools.cache
def _rounds(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CONVERTS


def _quantized(
    before: str,
    x: Tensor,
    more: Tensor | None,
    commands: tuple[Tensor, Tensor] | None,
    eps: float,
    columns: int,
    kind: str,
    rotation: int,
    way: Way | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch: tensors are (B, L, width), one stride for the last dimension."""
    row, (batch, tokens) = KINDS[kind], x.shape[:2]
    q = torch.empty((batch * tokens, columns), dtype=row.dtype, device=x.device)
    scale = torch.empty((batch * tokens, 1), dtype=torch.float32, device=x.device)
    more = x if more is None else more
    shift, factor = (x, x) if commands is None else commands
    integers, card = row.dtype == torch.int8, _rounds(x.device)
    warps, held = way or way_for(before, columns, rotation)
    chunk = max(warps * 32 * _VALUES, rotation)
    launch(
        _rows,
        batch * tokens,
        warps,
        x,
        more,
        shift,
        factor,
        q if integers or card else q.view(torch.uint8),
        scale,
        columns,
        x.shape[2],
        tokens,
        *x.stride()[:2],
        *more.stride()[:2],
        *steps(shift),
        *steps(factor),
        eps,
        BEFORE=before,
        SIZE=rotation,
        TOP=row.top,
        LEAST=LEAST_SCALE,
        INT=integers,
        CARD=card,
        CHUNK=chunk,
        CHUNKS=triton.cdiv(columns, chunk),
        CORES=not triton.knobs.runtime.interpret,  # it has no products of bfloat16
        HELD=held,
    )
    return q, scale


def quantize_rows(
    x: Tensor, kind: str, *, rotation: int = 0, way: Way | None = None
) -> tuple[Tensor, Tensor]:
    """See rows.quantize_rows; the same numbers, rotated ones to 16 bits."""
    columns = x.shape[1]
    if rotation and not serves(columns, rotation):
        return reference(x, kind, rotation=rotation)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.data_ptr() % 16 or x.stride(0) % 8:
        x = aligned(x)
    if columns and not serves(columns, rotation):
        return _in_two(x, kind)
    return _quantized("plain", x[None], None, None, 0.0, columns, kind, rotation, way)


def _in_two(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    row, (count, columns) = KINDS[kind], x.shape
    q = torch.empty((count, columns), dtype=row.dtype, device=x.device)
    scale = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    integers, card = row.dtype == torch.int8, _rounds(x.device)
    stored = q if integers or card else q.view(torch.uint8)
    constants = {"TOP": row.top, "LEAST": LEAST_SCALE, "INT": integers, "CARD": card}
    block = triton.next_power_of_2(_WIDEST)
    launch(_long_rows, count, 16, x, stored, scale, columns, x.stride(0), BLOCK=block, **constants)
    return q, scale


def modulated_rows(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, kind: str, rotation: int
) -> tuple[Tensor, Tensor]:
    """Rows of a layer norm times 1 + scale, plus shift, as tokens.modulated takes them.

    Returns:
        As quantize_rows, of what `modulated` would return in float32: q (B L, K), scale (B L, 1).
    """
    return _quantized("modulated", x, None, (shift, scale), eps, x.shape[2], kind, rotation)


def normed_rows(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str, rotation: int
) -> tuple[Tensor, Tensor]:
    """Rows of a layer norm of `x` (B, L, K) with its weight and bias (K,); see modulated_rows."""
    commands = (bias[None, None], weight[None, None])
    return _quantized("normed", x, None, commands, eps, x.shape[2], kind, rotation)


def activated_rows(
    first: Tensor, x: Tensor, kind: str, rotation: int, way: Way | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of `first` (B, L, W) and behind it GELU, by tanh, of `x` (B, L, K - W); W may be 0.

    Returns:
        As quantize_rows: q (B L, K), scale (B L, 1).
    """
    columns = first.shape[2] + x.shape[2]
    return _quantized("activated", first, x, None, 0.0, columns, kind, rotation, way)


def gated_rows(
    x: Tensor, gate: Tensor, kind: str, rotation: int, way: Way | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of `x` times GELU, by erf, of `gate`, both (B, L, K); see activated_rows."""
    return _quantized("gated", x, gate, None, 0.0, x.shape[2], kind, rotation, way)
