"""What a program of few.py takes, for each family of formats and number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "CANDIDATES",
    "CLASSES",
    "LIMITS",
    "MOST_ROWS",
    "TILES",
    "FewTile",
    "most_rows",
    "rows_class",
    "tile_for",
    "usable",
]

CLASSES = (1, 16, 32, 64)  # rows of activations
MOST_ROWS = CLASSES[-1]
_MOST_SHARES = 16


class FewTile(NamedTuple):
    """What a program takes, and how many programs there should be.

    Attributes:
        n: rows of the weight; with tensor cores 16 a warp, or 64 and a multiple of four warps.
        k: weights of each row in a step.
        warps: of a program.
        group: weights of a plane that a thread reads at once; blocks are read by words.
        stages: steps whose loads are under way; 1: those of one.
        programs: K is shared out while there are fewer than this; 0: never.
    """

    n: int
    k: int
    warps: int
    group: int = 8
    stages: int = 1
    programs: int = 0

    def share(self, tiles: int, units: int, step: int) -> int:
        """How many of `units` along K a program takes: whole steps, all if programs are enough."""
        shares = min(_MOST_SHARES, max(1, self.programs // max(1, tiles)))
        return max(1, -(-units // (shares * step))) * step


# For families that no sweep has seen: 32 or 64 weights to a thread. With more, registers allow few
# warps on a multiprocessor at a time.
_DEFAULTS = {
    1: FewTile(4, 1024, 4),
    16: FewTile(64, 128, 4, stages=3, programs=528),
    32: FewTile(64, 64, 4, stages=3, programs=528),
    64: FewTile(64, 64, 4, stages=3, programs=528),
}
# (family, class of rows): the fastest on one H100 over six layers of Flux.1, docs/lab-log.md,
# 2026-11-28; `benchmarks/gpu_matmul.py --parts few --sweep` prints this table and the next. 32 rows
# were not swept and take what 64 do.
TILES: dict[tuple[str, int], FewTile] = {
    ("1x32", 16): FewTile(64, 64, 4, stages=3, programs=528),
    ("1x32", 32): FewTile(64, 64, 4, stages=3, programs=1056),
    ("1x32", 64): FewTile(64, 64, 4, stages=3, programs=1056),
    ("2x16", 32): FewTile(128, 64, 8, stages=3, programs=264),
    ("2x16", 64): FewTile(128, 64, 8, stages=3, programs=264),
    ("2x32", 16): FewTile(64, 128, 4, stages=3, programs=1056),
    ("2x32", 32): FewTile(64, 128, 4, stages=3, programs=528),
    ("2x32", 64): FewTile(64, 128, 4, stages=3, programs=528),
    ("4x16", 1): FewTile(4, 512, 1, programs=4224),
    ("4x16", 32): FewTile(64, 128, 4, stages=3, programs=1056),
    ("4x16", 64): FewTile(64, 128, 4, stages=3, programs=1056),
    ("scaled", 1): FewTile(2, 1024, 4),
    ("scaled", 16): FewTile(64, 64, 4, stages=3, programs=1056),
    ("flat", 1): FewTile(8, 256, 1, programs=4224),
    ("flat", 16): FewTile(64, 256, 4, programs=1056),
    ("flat", 32): FewTile(64, 64, 4, group=16, programs=528),
    ("flat", 64): FewTile(64, 64, 4, group=16, programs=528),
}
# Formats for which decoding first is faster from fewer rows on than MOST_ROWS: the rows up to which
# they are served; 0: never.
LIMITS: dict[str, int] = {}

_ONE = (
    FewTile(4, 256, 1),
    FewTile(2, 512, 1),
    FewTile(4, 512, 1),
    FewTile(8, 256, 1),
    FewTile(4, 512, 2),
    FewTile(2, 1024, 4),
    FewTile(4, 1024, 4),
    FewTile(4, 256, 1, group=16),
)
_SEVERAL = (
    FewTile(64, 64, 4),
    FewTile(64, 128, 4),
    FewTile(64, 64, 4, stages=3),
    FewTile(64, 128, 4, stages=3),
    FewTile(64, 64, 4, group=16),
    FewTile(64, 256, 4),
    FewTile(128, 64, 8),
)
_MANY = (
    FewTile(64, 64, 4),
    FewTile(64, 128, 4),
    FewTile(64, 64, 4, stages=3),
    FewTile(64, 128, 4, stages=3),
    FewTile(64, 64, 4, group=16),
    FewTile(128, 64, 4),
    FewTile(128, 64, 8),
    FewTile(128, 128, 8),
    FewTile(128, 64, 8, stages=3),
    FewTile(256, 64, 8),
)
_PROGRAMS = {1: (0, 1056, 2112, 4224), 16: (0, 528, 1056, 2112), 64: (0, 264, 528, 1056, 2112)}
# What a sweep tries for each class of rows.
CANDIDATES: Mapping[int, tuple[FewTile, ...]] = {
    rows: tuple(tile._replace(programs=n) for tile in tiles for n in _PROGRAMS[rows])
    for rows, tiles in ((1, _ONE), (16, _SEVERAL), (64, _MANY))
}


def rows_class(rows: int) -> int:
    """The smallest class that holds so many rows."""
    return next(one for one in CLASSES if rows <= one)


def most_rows(fmt: str) -> int:
    """Rows of activations up to which a format is served."""
    return LIMITS.get(fmt, MOST_ROWS)


def tile_for(family: str, rows: int, itemsize: int) -> FewTile:
    """The tile in use; with operands of 4 bytes a step is half as long at least."""
    which = rows_class(rows)
    tile = TILES.get((family, which), _DEFAULTS[which])
    return tile if itemsize == 2 or which == 1 else tile._replace(k=min(tile.k, 64), stages=1)


def usable(family: str, tile: FewTile, rows: int, itemsize: int) -> bool:
    """Whether a tile gives right numbers as Triton 3.6.0 compiles it; its interpreter's are right.

    Found on an H100, 2026-11-28. Wrong: nf4 and fp4 by one row with 16 units in a program; Q2_K,
    Q3_K and Q6_K by `mma` (cards that are not Hopper's, and there fewer than four warps) with one
    unit of four planes a step. Float32 goes without tensor cores.
    """
    if rows == 1:
        return family != "flat" or tile.n * tile.k >= 2048
    return itemsize == 4 or family != "4x16" or tile.k >= 128
