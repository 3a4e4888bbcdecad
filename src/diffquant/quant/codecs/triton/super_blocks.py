"""Device functions: a super-block's sub-blocks in neighbouring lanes, what they store together."""

from __future__ import annotations

import triton
import triton.language as tl

from diffquant.quant.codecs.triton.numbers import nearest_int, usable

__all__ = ["halves_of", "largest_of", "part_places", "per_lane", "quarters", "round_steps"]


@triton.jit
def per_lane(values, BLOCKS: tl.constexpr, SUB: tl.constexpr):
    """(B,) -> (SUB B,): the same for every sub-block."""
    return tl.reshape(tl.broadcast_to(values[:, None], (BLOCKS, SUB)), (BLOCKS * SUB,))


@triton.jit
def round_steps(values, BLOCKS: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr):
    """(SUB B,) -> steps (B, SUB) in a byte, the largest is TOP; and the size of a step (B,)."""
    values = tl.reshape(values, (BLOCKS, SUB))
    most = tl.maximum(tl.max(values, axis=1), 0.0)
    top = tl.full(most.shape, TOP, tl.float32)
    factor = tl.where(most > 0.0, usable(tl.div_rn(top, most)), 0.0)
    return nearest_int(factor[:, None] * values) & 255, tl.div_rn(most, top)


@triton.jit
def largest_of(scale, BLOCKS: tl.constexpr, SUB: tl.constexpr):
    """(SUB B,) -> (B,): the first scale of largest magnitude of every super-block."""
    scale = tl.reshape(scale, (BLOCKS, SUB))
    size = tl.abs(scale)
    place = tl.arange(0, SUB)[None, :]
    first = tl.min(tl.where(size == tl.max(size, axis=1)[:, None], place, SUB), axis=1)
    return tl.sum(tl.where(place == first[:, None], scale, 0.0), axis=1)  # one, and zeros: exact


@triton.jit
def halves_of(steps, BLOCKS: tl.constexpr, SUB: tl.constexpr):
    """(B, SUB) -> those of the first and of the last sub-blocks, (B, SUB / 2) each."""
    return tl.split(tl.permute(tl.reshape(steps, (BLOCKS, 2, SUB // 2)), (0, 2, 1)))


@triton.jit
def quarters(level, BLOCKS: tl.constexpr):
    """Sixteen sub-blocks of 16: (16 B,) -> a, b, c, d, (4 B,) each.

    Every half of 128 weights has four quarters of 32, and these two parts of 16; what comes back is
    ordered by halves, then parts, as `part_places` says.
    """
    level = tl.permute(tl.reshape(level, (BLOCKS, 2, 2, 2, 2)), (0, 1, 4, 3, 2))
    first, second = tl.split(tl.reshape(level, (BLOCKS * 8, 2)))  # a and b, c and d
    a, b = tl.split(tl.reshape(first, (BLOCKS * 4, 2)))
    c, d = tl.split(tl.reshape(second, (BLOCKS * 4, 2)))
    return a, b, c, d


@triton.jit
def part_places(
    BLOCKS: tl.constexpr, NBYTES: tl.constexpr, AT: tl.constexpr, HALF_NBYTES: tl.constexpr
):
    """Where 16 bytes of every part go: super-blocks of NBYTES, halves of HALF_NBYTES from AT on."""
    part = tl.arange(0, BLOCKS * 4)
    return part // 4 * NBYTES + AT + part // 2 % 2 * HALF_NBYTES + part % 2 * 16
