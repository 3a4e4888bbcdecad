"""From functions on blocks to a codec on rows: what all ggml block formats share.

A row of K weights is K / block_size blocks side by side, each `block_nbytes` long
(core/dtypes.py), and no block sees another. So rows are encoded as one flat list of blocks, and
any split into row chunks gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.dtypes import storage
from diffquant.quant.codecs.arrays import Bytes, Decode, Encode, Float32, Parts, frozen
from diffquant.quant.formats import format_named

__all__ = ["row_codec"]


def row_codec(
    encode_blocks: Callable[[Float32], Bytes], decode_blocks: Callable[[Bytes], Float32]
) -> tuple[Encode, Decode]:
    """Make `encode` and `decode` of a block format.

    Args:
        encode_blocks: (B, block_size) float32 -> (B, block_nbytes) uint8.
        decode_blocks: the inverse.
    """

    def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
        """Quantize rows to blocks, byte for byte as ggml does without an importance matrix.

        Args:
            weight: (R, K) float32, C-contiguous, K a multiple of the block size.
            stats: not used.
            fmt: FORMATS name.

        Returns:
            weight: (R, K / block_size * block_nbytes) uint8.

        Raises:
            UnsupportedShape: K does not divide into blocks.
        """
        del stats
        format_named(fmt).demand(weight.shape)
        row = storage(fmt.upper())
        rows, width = weight.shape
        # Weights near the largest float overflow a scale: the engine refuses what is not finite.
        with np.errstate(all="ignore"):
            packed = encode_blocks(frozen(weight, (-1, row.block_size)))
        return {"weight": packed.reshape(rows, width // row.block_size * row.block_nbytes)}

    def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
        """Dequantize rows of blocks, exact in float32 (ggml's own order of operations).

        Args:
            parts: weight: (R, K / block_size * block_nbytes) uint8.
            shape: (R, K).
            fmt: FORMATS name.
        """
        row = storage(fmt.upper())
        count = shape[0] * shape[1] // row.block_size
        with np.errstate(all="ignore"):
            blocks = decode_blocks(frozen(parts["weight"], (count, row.block_nbytes)))
        return blocks.reshape(shape)

    return encode, decode
