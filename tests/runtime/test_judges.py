import numpy as np
import pytest

from diffquant.runtime.judges import Pooled, defects, psnr_db, ssim


def gradient():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    return np.stack(
        [np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 0.5)], axis=2
    ).astype(np.float32)


def test_psnr_of_a_known_error():
    assert psnr_db(gradient(), gradient() + np.float32(0.1)) == pytest.approx(20.0, abs=1e-4)


def test_identical_pictures_have_no_psnr():
    assert psnr_db(gradient(), gradient()) is None


def test_psnr_is_nan_where_a_picture_is_not_finite():
    broken = gradient()
    broken[0, 0, 0] = np.nan
    assert np.isnan(psnr_db(gradient(), broken))
    assert np.isnan(ssim(gradient(), broken))


def test_pooling_adds_squared_errors_not_decibels():
    pooled = Pooled()
    pooled.add(gradient(), gradient() + np.float32(0.1))
    pooled.add(gradient(), gradient())
    assert pooled.psnr_db == pytest.approx(-10 * np.log10(0.01 / 2), abs=1e-4)


def test_interval_holds_the_pooled_value():
    pooled = Pooled()
    for error in (0.01, 0.02, 0.05, 0.1):
        pooled.add(gradient(), gradient() + np.float32(error))
    low, high = pooled.interval_db()
    assert low < pooled.psnr_db < high


def test_a_single_pair_has_no_interval():
    pooled = Pooled()
    pooled.add(gradient(), gradient() + np.float32(0.1))
    assert pooled.interval_db() is None


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (np.zeros((64, 64, 3)), ("black", "flat")),
        (np.full((64, 64, 3), 0.5), ("flat",)),
        (np.random.default_rng(0).random((64, 64, 3)), ("noise",)),
        (np.full((64, 64, 3), np.nan), ("not finite",)),
        (gradient(), ()),
    ],
)
def test_defects_are_named(picture, found):
    assert defects(picture.astype(np.float32)) == found


def test_red_on_blue_of_equal_grey_is_a_picture():
    picture = np.zeros((64, 64, 3), np.float32)
    picture[..., 2] = 0.9
    picture[20:40, 20:40] = (0.9, 0.0, 0.0)
    assert defects(picture) == ()
