import numpy as np
import pytest
from PIL import Image

from diffquant.publish.grid import column_label, sample_grid, to_image
from diffquant.publish.rows import decibel_text, number_text, size_text
from diffquant.runtime.comparison import Row, Value

RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def flat(colour, height=64, width=64):
    return np.broadcast_to(np.array(colour, np.float32), (height, width, 3)).copy()


def draw(tmp_path, columns, labels, name="grid.png"):
    path = tmp_path / name
    sample_grid(columns, labels, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def row(psnr=47.31, **changes):
    values = {"psnr": Value(psnr)}
    fields = {"name": "out.gguf", "kind": "candidate", "type": "q8_0", "nbytes": 4_300_000}
    return Row(**{**fields, "values": values, **changes})


def extent(pixels, colour):
    """First and last row and column with exactly this colour."""
    hit = (pixels == np.array(colour) * 255).all(axis=2)
    ys, xs = np.nonzero(hit)
    return ys.min(), ys.max(), xs.min(), xs.max(), hit.sum()


def test_pictures_stand_in_columns_and_rows_enlarged_by_whole_factors(tmp_path):
    grid = draw(
        tmp_path,
        [("original", [flat(RED), flat(GREEN)]), ("q8_0", [flat(BLUE), flat((1, 0, 1))])],
        ["first", "second"],
    )
    red, green, blue = (extent(grid, colour) for colour in (RED, GREEN, BLUE))
    assert red[4] == green[4] == blue[4] == 192 * 192
    assert (red[1] - red[0] + 1, red[3] - red[2] + 1) == (192, 192)
    assert red[2:4] == green[2:4]
    assert green[0] > red[1]
    assert blue[:2] == red[:2]
    assert blue[2] > red[3]


@pytest.mark.parametrize(
    ("side", "shown"), [(16, 160), (80, 160), (128, 160), (200, 200), (512, 384)]
)
def test_pictures_are_shown_at_a_readable_size(tmp_path, side, shown):
    grid = draw(tmp_path, [("original", [flat(RED, side, side)])], ["a"])
    top, bottom, left, right, _ = extent(grid, RED)
    assert (bottom - top + 1, right - left + 1) == (shown, shown)


def test_pictures_that_are_not_square_keep_their_shape(tmp_path):
    grid = draw(tmp_path, [("original", [flat(RED, 64, 128)])], ["a"])
    assert extent(grid, RED)[4] == 80 * 160


def test_labels_are_drawn_over_their_column_and_beside_their_row(tmp_path):
    grid = draw(tmp_path, [("original\n4 MiB", [flat(RED)]), ("", [flat(BLUE)])], ["prompt"])
    top, bottom, left, right, _ = extent(grid, RED)
    assert (grid[:top, left : right + 1] < 128).any(axis=2).sum() > 50
    assert (grid[top : bottom + 1, :left] < 128).any(axis=2).sum() > 50
    beside = extent(grid, BLUE)
    assert (grid[:top, beside[2] : beside[3] + 1] == 255).all()
    assert (grid[bottom + 1 :] == 255).all()


@pytest.mark.parametrize("prompt", ["word " * 400, "x" * 2000, "é貓\n\t" * 50, ""])
def test_long_or_foreign_prompts_stay_inside_their_row(tmp_path, prompt):
    grid = draw(tmp_path, [("o", [flat(RED), flat(BLUE)])], [prompt, ""])
    assert extent(grid, RED)[4] == extent(grid, BLUE)[4] == 192 * 192
    top, bottom, left, *_ = extent(grid, BLUE)
    assert (grid[top : bottom + 1, :left] == 255).all()


def test_bytes_depend_on_the_arguments_only(tmp_path):
    columns = [("original\nx", [np.random.default_rng(0).random((40, 40, 3), np.float32)])]
    draw(tmp_path, columns, ["a prompt"], "one.png")
    draw(tmp_path, columns, ["a prompt"], "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"tEXt" not in (tmp_path / "one.png").read_bytes()


def test_a_column_without_a_picture_per_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'q8_0' has 1 pictures for 2 rows"):
        sample_grid([("q8_0", [flat(RED)])], ["a", "b"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="at least"):
        sample_grid([], [], tmp_path / "grid.png")


def test_values_outside_the_range_are_clipped_and_not_finite_ones_black():
    picture = np.array([[[2.0, -1.0, 0.5], [np.nan, np.inf, 1.0]]], np.float32)
    assert np.asarray(to_image(picture)).tolist() == [[[255, 0, 128], [0, 0, 255]]]


def test_column_labels_state_size_and_psnr():
    assert column_label(row()) == "q8_0\n4.10 MiB, 47.3 dB"
    assert column_label(row(None, identical=True)) == "q8_0\n4.10 MiB, identical"
    assert column_label(row(None)) == "q8_0\n4.10 MiB"
    assert column_label(row(type="", nbytes=None, name="noise floor")) == "noise floor\n47.3 dB"


def test_numbers_tell_not_measured_from_not_finite():
    assert (number_text(None, 2), number_text(float("nan"), 2)) == ("-", "not finite")
    assert (decibel_text(None), decibel_text(float("inf"))) == ("-", "not finite")
    assert (decibel_text(31.04), decibel_text(None, identical=True)) == ("31.0 dB", "identical")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1023 * 1024, "1.00 MiB"),
        (512 * 2**20, "512 MiB"),
        (3 * 2**40, "3072 GiB"),
    ],
)
def test_sizes_have_three_digits(nbytes, text):
    assert size_text(nbytes) == text
