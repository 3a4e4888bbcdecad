"""Grids of the IQ formats: shapes, values and signs as gguf-py and ggml have them."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.quant.codecs.grids import even_signs, grid

GRIDS = {
    "iq1_s": (2048, 8, {-1, 0, 1}),
    "iq1_m": (2048, 8, {-1, 0, 1}),
    "iq2_xxs": (256, 8, {8, 25, 43}),
    "iq2_xs": (512, 8, {8, 25, 43}),
    "iq2_s": (1024, 8, {8, 25, 43}),
    "iq3_xxs": (256, 4, {4, 12, 20, 28, 36, 44, 52, 62}),
    "iq3_s": (512, 4, {1, 3, 5, 7, 9, 11, 13, 15}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_hold_distinct_entries_of_the_formats_values(name: str) -> None:
    entries, width, values = GRIDS[name]
    table = grid(name)
    assert table.shape == (entries, width)
    assert table.dtype == np.float32
    assert not table.flags.writeable
    assert set(table.reshape(-1).tolist()) == values
    assert len(np.unique(table, axis=0)) == entries


def test_even_signs_are_ggufs() -> None:
    quants = pytest.importorskip("gguf").quants
    assert even_signs().tobytes() == quants.IQ2_XXS.ksigns
