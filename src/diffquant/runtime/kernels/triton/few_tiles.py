"""What a program of few.py takes, for each family of formats and number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "CANDIDATES",
    "CLASSES",
    "LEAST_WITH_CORES",
    "LIMITS",
    "MOST_ROWS",
    "TILES",
    "FewTile",
    "most_rows",
    "rows_class",
    "tile_for",
]

CLASSES = (1, 16, 32, 64)  # rows of activations
MOST_ROWS = CLASSES[-1]
# Rows of the weight that tensor cores take at least: with fewer (16 a warp: 16 or 32) Triton 3.6
# compiles kernels that give wrong numbers for q6_k on an H100; its interpreter gives right ones.
LEAST_WITH_CORES = 64
_MOST_SHARES = 16


class FewTile(NamedTuple):
    """What a program takes, and how many programs there should be.

    Attributes:
        n: rows of the weight; with tensor cores LEAST_WITH_CORES or more, and a multiple of four
            warps.
        k: weights of each row in a step.
        warps: of a program.
        group: weights of a plane that a thread reads at once; blocks are read by words.
        stages: steps whose loads are under way; 1: those of one.
        programs: K is shared out while there are fewer than this; 0: never.
        cores: whether one row of activations is multiplied by tensor cores too.
    """

    n: int
    k: int
    warps: int
    group: int = 8
    stages: int = 1
    programs: int = 0
    cores: bool = False

    def share(self, tiles: int, units: int, step: int) -> int:
        """How many of `units` along K a program takes: whole steps, all if programs are enough."""
        shares = min(_MOST_SHARES, max(1, self.programs // max(1, tiles)))
        return max(1, -(-units // (shares * step))) * step


# 32 weights to a thread: more, and registers allow few warps on a multiprocessor at a time.
_DEFAULTS = {
    1: FewTile(4, 256, 1, programs=2112),
    16: FewTile(64, 64, 4, programs=528),
    32: FewTile(64, 64, 4, programs=528),
    64: FewTile(64, 64, 4, programs=264),
}
# (family, class of rows): where another tile is faster; benchmarks/gpu_matmul.py --parts few
# --sweep prints this table and the next. These have fewer instructions for each weight and as many
# weights on a multiprocessor, as compiled for capability 9.0; no sweep has chosen them.
TILES: dict[tuple[str, int], FewTile] = {
    ("2x32", 1): FewTile(4, 512, 1, programs=2112),
    ("2x32", 16): FewTile(64, 128, 4, programs=528),
    ("4x16", 1): FewTile(4, 512, 1, programs=2112),
    ("4x16", 16): FewTile(64, 128, 4, programs=528),
    ("scaled", 16): FewTile(64, 128, 4, programs=528),
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
    FewTile(64, 64, 4, cores=True),
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
