"""Candidates of combinations off the grid: which points, in which order, for which format."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq_candidates import grid_named
from diffquant.quant.codecs.numba.iq_nearest import tables_named

# Name -> distances that count as near, combinations that are no grid point, all their candidates.
# Totals are those of ggml's neighbour lists for combinations that a rounding can give.
GRIDS = {
    "iq2_xxs": (2, 6305, 113157),
    "iq2_xs": (2, 6049, 181721),
    "iq2_s": (1, 5537, 44716),
    "iq3_xxs": (2, 3840, 18985),
    "iq3_s": (3, 3584, 24733),
}


@pytest.mark.parametrize("name", GRIDS)
def test_candidates_are_the_nearest_points_in_order(name: str) -> None:
    distances, off, total = GRIDS[name]
    found = grid_named(name)
    counts = np.diff(found.first)
    assert (found.point < 0).sum() == off
    assert (counts > 0).sum() == off
    assert len(found.candidates) == total
    points = found.levels.astype(int)
    for combination in np.flatnonzero(counts)[::97]:
        levels = [combination // found.base**i % found.base for i in range(found.group)]
        distance = [int(((np.array(levels) - point) ** 2).sum()) for point in points]
        near = sorted(set(distance))[:distances]
        wanted = sorted((d, index) for index, d in enumerate(distance) if d in near)
        listed = found.candidates[found.first[combination] : found.first[combination + 1]]
        assert listed.tolist() == [index for _, index in wanted]


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_point_is_its_own_combination(name: str) -> None:
    found = grid_named(name)
    combination = found.levels.astype(int) @ found.base ** np.arange(found.group)
    assert found.point[combination].tolist() == list(range(len(grid(name))))
    values = np.unique(grid(name))
    np.testing.assert_array_equal(values[found.levels], grid(name))


@pytest.mark.parametrize("name", GRIDS)
def test_the_fast_tables_hold_the_same_candidates(name: str) -> None:
    found = grid_named(name)
    entries, candidates = tables_named(name)
    fields = found.code_bits * np.arange(found.group)

    def levels(codes: np.ndarray) -> np.ndarray:
        return ((codes[..., None] >> fields & ((1 << found.code_bits) - 1)) - 1) // 2

    on = found.point >= 0
    np.testing.assert_array_equal(levels(entries[on]), found.levels[found.point[on]])
    for combination in np.flatnonzero(~on)[::97]:
        first, chunks = divmod(-int(entries[combination]), 32)
        listed = found.candidates[found.first[combination] : found.first[combination + 1]]
        slots = candidates[first : first + chunks].reshape(-1)
        assert len(slots) - 16 < len(listed) <= len(slots)
        np.testing.assert_array_equal(levels(slots[: len(listed)]), found.levels[listed])
        assert (slots[len(listed) :] == slots[len(listed) - 1]).all()
