import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from made_comparison import MADE, drawn
from PIL import Image

from diffquant.publish.embedding import HEAT_FULL, data_uri, embed, heat_map, pair_labels
from diffquant.publish.grid import to_image
from diffquant.runtime.comparison import ComparisonPictures


def decoded(uri):
    assert uri.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_are_embedded_without_loss():
    pictures = drawn()
    found = embed(MADE, pictures)
    assert (found.count, found.total, found.left_out) == (16, 16, "")
    for index, pair in found.pairs.items():
        exact = pictures.reference[index]
        assert (decoded(pair[None].picture) == np.asarray(to_image(exact))).all()
        for name, drawn_by in pictures.rows.items():
            other = drawn_by[index]
            assert (decoded(pair[name].picture) == np.asarray(to_image(other))).all()
            heat = heat_map(exact, other).convert("RGB")
            assert (decoded(pair[name].heat) == np.asarray(heat)).all()


def test_what_does_not_fit_is_left_out_and_named():
    whole = embed(MADE, drawn())
    half = embed(MADE, drawn(), limit=whole.nbytes * 3 // 4)
    assert half.nbytes <= whole.nbytes * 3 // 4
    assert 8 < half.count < 16
    assert set(half.pairs) == {0, 1}
    assert len(half.pairs[0]) == 8
    assert "of “a star”" in half.left_out
    assert "control" in half.left_out
    first = embed(MADE, drawn(), limit=whole.nbytes // 2)
    assert first.left_out.endswith("all of “a star”")
    none = embed(MADE, drawn(), limit=10)
    assert (none.count, none.left_out) == (0, "all of “a red circle”, “a star”")


def test_pairs_are_labelled_with_seeds_where_there_are_several():
    assert pair_labels(MADE) == MADE.prompts
    assert pair_labels(replace(MADE, seeds=(0, 7)))[:3] == (
        "a red circle, seed 0",
        "a red circle, seed 7",
        "a star, seed 0",
    )


def test_pictures_that_do_not_belong_are_refused():
    some = drawn()
    first = next(iter(some.rows))
    short = ComparisonPictures(some.reference, {first: some.rows[first][:1]})
    with pytest.raises(ValueError, match=r"tiny-f32.gguf has 1 pictures for 2 prompts and seeds"):
        embed(MADE, short)
    with pytest.raises(ValueError, match="stranger has pictures and no row"):
        embed(MADE, ComparisonPictures(some.reference, {"stranger": some.reference}))
    small = tuple(picture[:16] for picture in some.reference)
    with pytest.raises(ValueError, match=r"shape \(16, 32, 3\) beside \(32, 32, 3\)"):
        embed(MADE, ComparisonPictures(some.reference, {first: small}))


def test_differences_are_taken_before_rounding_and_clipped():
    exact = np.zeros((1, 4, 3), np.float32)
    other = exact.copy()
    other[0, 1, 2] = HEAT_FULL / 4
    other[0, 2, 0] = 1.0
    other[0, 3, 1] = np.nan
    image = heat_map(exact, other)
    assert np.asarray(image).tolist() == [[0, 128, 255, 255]]
    assert np.asarray(image.convert("RGB"))[0, 2].tolist() == [255, 255, 255]


def test_a_picture_of_nothing_finite_is_black_beside_the_largest_difference():
    pictures = drawn()
    name = next(iter(pictures.rows))
    broken = tuple(np.full_like(picture, np.nan) for picture in pictures.reference)
    found = embed(MADE, ComparisonPictures(pictures.reference, {name: broken}))
    assert not decoded(found.pairs[0][name].picture).any()
    assert (decoded(found.pairs[0][name].heat) == 255).all()


def test_encoding_depends_on_the_pixels_only():
    image = to_image(drawn().reference[0])
    assert data_uri(image) == data_uri(image.copy())
