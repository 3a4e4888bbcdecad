"""From functions on blocks to a codec on rows: what all ggml block formats share.

A row of K weights is K / block_size blocks side by side, each `block_nbytes` long
(core/dtypes.py), and no block sees another. So rows are encoded as one flat list of blocks, and
any split into row chunks gives the same bytes. With importance a block also needs its columns'
values, and some formats weigh by the whole row: those encoders get rows, not blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.dtypes import storage
from diffquant.core.errors import ImportanceRequired, UnsupportedShape
from diffquant.quant.codecs.arrays import Bytes, Decode, Encode, Float32, Parts, frozen
from diffquant.quant.formats import format_named

__all__ = ["row_codec"]


def row_codec(
    encode_blocks: Callable[[Float32], Bytes] | None,
    decode_blocks: Callable[[Bytes], Float32],
    encode_weighted: Callable[[Float32, Float32], Bytes] | None = None,
) -> tuple[Encode, Decode]:
    """Make `encode` and `decode` of a block format.

    Args:
        encode_blocks: (B, block_size) float32 -> (B, block_nbytes) uint8, the mode without
            importance; None where ggml has none.
        decode_blocks: the inverse.
        encode_weighted: rows (R, K) float32 and importance (K,) float32 -> (R, K / block_size *
            block_nbytes) uint8, the mode with importance; None where ggml ignores importance.
    """

    def encode(
        weight: Float32,
        stats: float | None = None,
        *,
        fmt: str,
        importance: Float32 | None = None,
    ) -> Parts:
        """Quantize rows to blocks, byte for byte as ggml does in the same mode.

        Args:
            weight: (R, K) float32, C-contiguous, K a multiple of the block size.
            stats: not used.
            fmt: FORMATS name.
            importance: (K,) float32, not negative: how much an error in each column counts, an
                imatrix row. None selects the mode without importance, which is another algorithm.

        Returns:
            weight: (R, K / block_size * block_nbytes) uint8.

        Raises:
            UnsupportedShape: K does not divide into blocks, or importance has another length.
            ImportanceRequired: the format has no mode without importance.
        """
        del stats
        format_named(fmt).demand(weight.shape)
        row = storage(fmt.upper())
        rows, width = weight.shape
        # Weights near the largest float overflow a scale: the engine refuses what is not finite.
        with np.errstate(all="ignore"):
            if importance is not None and encode_weighted is not None:
                if importance.shape != (width,):
                    raise UnsupportedShape(
                        f"importance of shape {importance.shape} for rows of {width}"
                    )
                columns = frozen(np.asarray(importance, np.float32), width)
                packed = encode_weighted(frozen(weight, (rows, width)), columns)
            elif encode_blocks is not None:
                packed = encode_blocks(frozen(weight, (-1, row.block_size)))
            else:
                raise ImportanceRequired(f"{fmt} cannot be encoded without an importance matrix")
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
