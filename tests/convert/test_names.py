"""Reading key sets that come from strangers."""

from __future__ import annotations

import pytest

from diffquant.convert.architectures.names import count, index_of
from diffquant.convert.generic import structure


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("0", 0),
        ("41", 41),
        ("999", 999),
        ("1000", None),
        ("9" * 5000, None),
        ("²", None),
        ("٣", None),
        ("", None),
        ("-1", None),
        ("1_0", None),
    ],
)
def test_an_index_is_a_short_number_in_plain_digits(text, index):
    assert index_of(text) == index


def test_a_module_list_is_no_longer_than_its_highest_plausible_index():
    keys = ("blocks.0.w", "blocks.2.w", "blocks.999999999999.w", "blocks.x.w", "other.7.w")
    assert count(dict.fromkeys(keys, (1,)), "blocks") == 3
    assert count({}, "blocks") == 0


def test_an_endless_number_is_no_block():
    shapes = {f"blocks.{'9' * 5000}.w.weight": (4, 4), "blocks.1.w.weight": (4, 4)}
    assert structure(shapes) == ()
