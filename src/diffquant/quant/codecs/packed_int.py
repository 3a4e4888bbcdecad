"""Integers of 1 to 7 bits that share bytes as SDNQ packs them: read only.

A unit is the fewest elements that fill whole bytes. Its first elements lie at the bottom of a byte
each; the rest is cut up and put into the bits that are left above them::

    bits   elements  bytes   elements after those at the bottom of a byte
    1 2 4  8 4 2     1       next to each other, lowest bits first
    3      8         3       3-5 above 0-2; 6 and 7: two bits on top of bytes 0 and 1, one in byte 2
    5      8         5       5-7: three bits on top of bytes 0-2, two in bytes 3 and 4
    6      4         3       3: two bits on top of each byte, the highest first
    7      8         7       7: one bit on top of each byte, the highest first

Source: sdnq 0.2.8 packed_int/pack.py (the layout as facts; this is another program).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.tensors import ByteArray

__all__ = ["UNITS", "Unit", "unpack"]

Bits = tuple[int, int, int]  # which byte of the unit, how far to the right, what to keep


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of packed integers.

    Attributes:
        nbytes: bytes of the unit.
        elements: for each element, the pieces that it is put together from.
    """

    nbytes: int
    elements: tuple[tuple[Bits, ...], ...]


def _side_by_side(bits: int) -> Unit:
    mask = (1 << bits) - 1
    return Unit(1, tuple(((0, shift, mask),) for shift in range(0, 8, bits)))


def _spread(bits: int, count: int, rest: tuple[tuple[Bits, ...], ...]) -> Unit:
    mask = (1 << bits) - 1
    return Unit(count, (*(((byte, 0, mask),) for byte in range(count)), *rest))


UNITS: Mapping[int, Unit] = {
    1: _side_by_side(1),
    2: _side_by_side(2),
    3: _spread(
        3,
        3,
        (
            *(((byte, 3, 7),) for byte in range(3)),
            ((0, 6, 3), (2, 4, 4)),
            ((1, 6, 3), (2, 5, 4)),
        ),
    ),
    4: _side_by_side(4),
    5: _spread(
        5,
        5,
        (
            ((0, 5, 7), (3, 2, 24)),
            ((1, 5, 7), (4, 2, 24)),
            ((2, 5, 7), (3, 3, 16), (4, 4, 8)),
        ),
    ),
    6: _spread(6, 3, (((0, 2, 48), (1, 4, 12), (2, 6, 3)),)),
    7: _spread(7, 7, (tuple((byte, byte + 1, 64 >> byte) for byte in range(7)),)),
}


def unpack(packed: ByteArray, bits: int) -> NDArray[np.uint8]:
    """Take whole units apart.

    Args:
        packed: flat bytes, a whole number of units.
        bits: a key of UNITS.

    Returns:
        The integers, flat, unsigned.
    """
    unit = UNITS[bits]
    rows = packed.reshape(-1, unit.nbytes)
    out = np.zeros((len(rows), len(unit.elements)), np.uint8)
    for index, pieces in enumerate(unit.elements):
        for byte, shift, mask in pieces:
            out[:, index] |= (rows[:, byte] >> shift) & mask
    return out.reshape(-1)
