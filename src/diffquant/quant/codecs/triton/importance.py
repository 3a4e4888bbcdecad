"""Weights of squared errors from importance per column; see affine_search.weigh in codecs.

    weight = importance[column] * sqrt(sigma2 + x * x)

sigma2 is the mean square of a run of elements, added first to last: a kernel of its own, one lane
to a run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.launch import launch

__all__ = ["column_weights", "mean_squares", "spread_columns"]

_LANES = 32
_WARPS = 1


@triton.jit
def column_weights(importance, lane, columns, mask, SIZE: tl.constexpr):
    """Importance of every lane's elements: SIZE vectors (lanes,), rows have `columns` lanes."""
    found = ()
    for i in tl.static_range(SIZE):
        place = lane % columns * SIZE + i
        found = found + (tl.load(importance + place, mask=mask, other=0.0),)
    return found


@triton.jit
def spread_columns(x, importance, lane, columns, sigma2, run, mask):
    """Weights of every lane's elements; `run` lanes share a sigma2."""
    spread = tl.load(sigma2 + lane // run, mask=mask, other=0.0)
    column = column_weights(importance, lane, columns, mask, len(x))
    found = ()
    for i in tl.static_range(len(x)):
        found = found + (column[i] * tl.sqrt_rn(spread + x[i] * x[i]),)
    return found


@triton.jit(do_not_specialize=["groups"])
def _mean_squares(src, dst, groups, SIZE: tl.constexpr, FACTOR: tl.constexpr, LANES: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = group < groups
    total = tl.zeros((LANES,), tl.float32)
    for i in range(SIZE):
        x = tl.load(src + group * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        total = total + x * x
    divisor = tl.full((LANES,), SIZE, tl.float32)
    tl.store(dst + group, tl.div_rn(total * FACTOR, divisor), mask=mask)


def mean_squares(weight: Tensor, size: int, factor: float = 1.0) -> Tensor:
    """`factor`, a power of two, times the mean square of each run of `size` elements: (n,)."""
    groups = weight.numel() // max(size, 1)
    found = torch.empty(groups, dtype=torch.float32, device=weight.device)
    programs = -(-groups // _LANES)
    launch(
        _mean_squares,
        programs,
        _WARPS,
        weight,
        found,
        groups,
        SIZE=size,
        FACTOR=factor,
        LANES=_LANES,
    )
    return found
