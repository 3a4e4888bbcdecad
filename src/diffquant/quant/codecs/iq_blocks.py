"""Codecs of the IQ2 and IQ3 formats from three parts: a search, and how blocks pack and unpack.

A format's file says how its blocks are packed and unpacked; the plain codec and its fast twin
share that, and differ in how they search and how they look up grid points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Decode, Encode, Float32, Int32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.grids import even_signs, grid
from diffquant.quant.codecs.iq_search import RULES, SUPER_BLOCK, Found, search

__all__ = ["Stored", "grid_codec", "load_nibbles", "load_signs", "store_nibbles", "store_signs"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Unpacked super-blocks: each weight is `d * magnitude of its grid point`, signed.

    Attributes:
        d: (B, sub-blocks) float32.
        point: (B, 256 / group) grid indices.
        signs: (B, 32) bytes, bit j set where weight j of eight is negative.
    """

    d: Float32
    point: Int32
    signs: Bytes


Search = Callable[[str, Float32, Float32 | None], Found]
Expand = Callable[[str, Stored], Float32]


def grid_codec(
    name: str,
    pack: Callable[[Found], Bytes],
    unpack: Callable[[Bytes], Stored],
    *,
    find: Search = search,
    expand: Expand | None = None,
) -> tuple[Encode, Decode]:
    """Make `encode` and `decode` of a grid format.

    Args:
        name: FORMATS name.
        pack: what the search found -> (B, block_nbytes).
        unpack: the inverse.
        find: how super-blocks are searched; `importance` has one row for each column of blocks.
        expand: how grid points become weights, (B, 256); plain if None.
    """

    def encode_blocks(blocks: Float32) -> Bytes:
        return pack(find(name, blocks, None))

    def encode_weighted(rows: Float32, importance: Float32) -> Bytes:
        blocks, columns = rows.reshape(-1, SUPER_BLOCK), importance.reshape(-1, SUPER_BLOCK)
        return pack(find(name, blocks, columns))  # row_codec makes rows of them

    def decode_blocks(packed: Bytes) -> Float32:
        return (expand or _expand)(name, unpack(packed))

    plain = encode_blocks if RULES[name].plain is not None else None
    return row_codec(plain, decode_blocks, encode_weighted)


def _expand(name: str, stored: Stored) -> Float32:
    magnitude = grid(name)[stored.point].reshape(*stored.d.shape, -1)
    minus = np.unpackbits(stored.signs, axis=1, bitorder="little").astype(bool)
    scaled = (stored.d[:, :, None] * magnitude).reshape(-1, SUPER_BLOCK)
    return np.where(minus, -scaled, scaled)


def store_nibbles(levels: Bytes) -> Bytes:
    """(B, 2 n) levels below 16 -> (B, n): the first of a pair in the low nibble."""
    return levels[:, ::2] | levels[:, 1::2] << np.uint8(4)


def load_nibbles(packed: Bytes) -> Bytes:
    """(B, n) -> (B, 2 n), the inverse of `store_nibbles`."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(len(packed), -1)


def store_signs(signs: Bytes, levels: Bytes) -> Bytes:
    """Pack seven signs of each eight weights and a level per 32 weights.

    Args:
        signs: (B, 8, 4).
        levels: (B, 8) below 16.

    Returns:
        (B, 8, 4) bytes of little-endian words, signs of eights from bit 0 up, the level on top.
    """
    seven = (signs & np.uint8(127)).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)
    words = seven.sum(axis=2, dtype=np.uint32) | levels.astype(np.uint32) << np.uint32(28)
    packed: Bytes = words.astype("<u4")[:, :, None].view(np.uint8)
    return packed


def load_signs(packed: Bytes) -> tuple[Bytes, Float32]:
    """(B, 8, 4) bytes -> signs (B, 32) with the eighth restored, levels (B, 8) float32."""
    words = np.ascontiguousarray(packed).view("<u4").astype(np.uint32)  # (B, 8, 1)
    seven = words >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    signs = even_signs()[seven].reshape(len(packed), -1)
    return signs, (words[:, :, 0] >> np.uint32(28)).astype(np.float32)
