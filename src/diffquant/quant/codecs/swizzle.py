"""Where ComfyUI's mxfp8 and nvfp4 keep the scale of a block: the tiles that tensor cores read.

Scales of (R, C) blocks are padded with zero to whole tiles of 128 rows and 4 columns. A tile is 512
bytes; tiles follow each other row by row, and inside one, scale (r, c) is at

    (r % 32) * 16 + (r // 32) * 4 + c                       r < 128, c < 4

so four scales of a row are together, and rows 32 apart beside them. Read as a plain matrix, the
scales would land on other rows, and nothing would say so. Source: comfy_kitchen 0.2.40
float_utils.py to_blocked, from_blocked.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "rounded_up", "swizzle", "unswizzle"]

TILE_ROWS, TILE_COLUMNS = 128, 4
_GROUPS, _GROUP_ROWS = 4, 32


def rounded_up(count: int, multiple: int) -> int:
    """The next multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


def swizzle(scales: Bytes) -> Bytes:
    """Lay scales (R, C) out in tiles: (R rounded up to 128, C rounded up to 4)."""
    rows, columns = (
        rounded_up(scales.shape[0], TILE_ROWS),
        rounded_up(scales.shape[1], TILE_COLUMNS),
    )
    whole = np.zeros((rows, columns), np.uint8)
    whole[: scales.shape[0], : scales.shape[1]] = scales
    tiles = whole.reshape(-1, _GROUPS, _GROUP_ROWS, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzle(stored: Bytes, rows: int, columns: int) -> Bytes:
    """Bring the scales of (rows, columns) blocks back into the order of the blocks.

    Raises:
        ValueError: `stored` is not as many whole tiles.
    """
    high, wide = rounded_up(rows, TILE_ROWS), rounded_up(columns, TILE_COLUMNS)
    tiles = stored.reshape(
        high // TILE_ROWS, wide // TILE_COLUMNS, _GROUP_ROWS, _GROUPS, TILE_COLUMNS
    )
    return tiles.transpose(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :columns]
