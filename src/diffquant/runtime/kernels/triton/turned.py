"""Activations rotated in a program: two small products on tensor cores.

These keep 16 bits of each number, and rows of 8 bits want no more. A network of sums with four
exchanges through shared memory took three to eight times as long as the rest of the kernel that
quantizes rows (docs/lab-log.md, 2026-11-27). Weights are rotated by rotated.py, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["turned"]


@triton.jit
def _factor(TWO: tl.constexpr):
    """(16, 16) float32: the rotation of two digits, or of the upper one of two."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    upper = tl.where(i // 4 + j // 4 == 3, -0.5, 0.5)  # symmetric, and its own inverse
    lower = tl.where(i % 4 + j % 4 == 3, -0.5, 0.5) if TWO else tl.where(i % 4 == j % 4, 1.0, 0.0)
    return upper * lower


@triton.jit
def _times(x, factor, CORES: tl.constexpr):
    """(M, 16) float32 times a factor; on tensor cores 16 bits of each number of x."""
    if CORES:
        upper = x.to(tl.bfloat16)
        lower = (x - upper.to(tl.float32)).to(tl.bfloat16)
        factor = factor.to(tl.bfloat16)  # exact
        y = tl.dot(lower, factor, tl.dot(upper, factor))
    else:
        y = tl.dot(x, factor, input_precision="ieee")
    return y


@triton.jit
def turned(x, CHUNK: tl.constexpr, SIZE: tl.constexpr, CORES: tl.constexpr):
    """Groups of SIZE rotated, of a chunk (CHUNK,).

    A group's place has digits of base 4, and each is rotated: the two fastest by one product, the
    others by a second, where groups lie across.
    """
    x = _times(tl.reshape(x, (CHUNK // 16, 16)), _factor(True), CORES)
    if SIZE > 16:
        across = tl.permute(tl.reshape(x, (CHUNK // SIZE, 16, SIZE // 16)), (0, 2, 1))
        across = _times(tl.reshape(across, (CHUNK // 16, 16)), _factor(SIZE == 256), CORES)
        x = tl.permute(tl.reshape(across, (CHUNK // SIZE, SIZE // 16, 16)), (0, 2, 1))
    return tl.reshape(x, (CHUNK,))
