"""What a job says of layers that may break pictures."""

from __future__ import annotations

import pytest

from diffquant.convert.losses import broken_pictures


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ([0.1, 0.13, 0.3], "no damage"),
        ([0.1, 0.16, 0.2], "grain"),
        ([0.22, 0.3, 0.25], "broken pictures"),
    ],
)
def test_w4a4_layers_are_judged_by_their_median(errors, verdict):
    rows = [("convrot_w4a4_64", error) for error in errors] + [("bf16", None)]
    (text,) = broken_pictures(rows)
    assert f"from weights alone {verdict} (" in text
    assert "asym_w4a8_int8" in text


def test_a_plan_of_w4a4_layers_warns_before_anything_is_measured():
    (text,) = broken_pictures([("convrot_w4a4", None)])
    assert "breaks pictures of some models" in text


def test_other_formats_are_not_judged():
    assert broken_pictures([("asym_w4a8_int8", 0.5), ("bf16", None)]) == ()
