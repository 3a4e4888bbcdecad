"""Grids of ggml's IQ formats: the short vectors that an index in a block stands for.

The tables are taken from gguf-py, which carries them packed, instead of being typed in again.

    format             entries x values   values
    iq2_xxs            256 x 8            8 25 43
    iq2_xs             512 x 8            8 25 43
    iq2_s              1024 x 8           8 25 43
    iq3_xxs            256 x 4            4 12 20 28 36 44 52 62
    iq3_s              512 x 4            odd numbers 1 to 15
    iq1_s, iq1_m       2048 x 8           -1 0 1

Source: gguf-py 0.19.0 gguf/quants.py (grid_hex, grid_map); ggml-common.h iq2xxs_grid to iq1s_grid,
ksigns_iq2xs, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import functools

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32

__all__ = ["even_signs", "grid"]


@functools.cache
def grid(name: str) -> Float32:
    """Load the grid of a format, float32 (entries, 4 or 8), read-only.

    Args:
        name: FORMATS name: iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs or iq3_s.
    """
    from gguf import quants  # loaded when an IQ tensor is first met

    kind = getattr(quants, name.upper())
    kind.init_grid()
    table = np.array(kind.grid, np.float32).reshape(kind.grid_shape)
    table.flags.writeable = False
    return table


def even_signs() -> Bytes:
    """Sign bits that seven stored bits stand for, uint8 (128,): bit 7 makes the count even."""
    index = np.arange(128)
    parity = index ^ index >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (index | (parity & 1) << 7).astype(np.uint8)
