"""Guidance against diffusers, and its cutoff."""

import pytest
import torch

from diffquant.core.errors import UsageError
from diffquant.runtime.guidance import Guidance, guided, needs_negative, rescaled


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 5, 6, generator=generator)


@pytest.mark.oracle
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(rescale, oracle):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    positive, negative = pair()
    plain = negative + 7.5 * (positive - negative)
    wanted = rescale_noise_cfg(plain, positive, guidance_rescale=rescale)
    found = Guidance(7.5, rescale=rescale).apply(positive, negative)
    oracle.assert_close(found, wanted)


def test_full_rescale_restores_the_contrast_of_the_positive_prediction():
    positive, negative = pair()
    found = rescaled(guided(positive, negative, 12.0), positive, 1.0)
    for one, other in zip(found, positive, strict=True):
        assert float(one.std()) == pytest.approx(float(other.std()), rel=1e-5)
    flat = torch.ones(1, 4, 2, 2)
    assert torch.equal(rescaled(guided(flat, flat, 7.0), flat, 1.0), flat)


def test_guidance_ends_at_its_cutoff():
    guide = Guidance(7.0, cutoff=0.75)
    assert [guide.at(index, 8).needs_negative for index in range(8)] == [True] * 6 + [False] * 2
    assert all(Guidance(7.0).at(index, 3).needs_negative for index in range(3))
    assert not any(Guidance(7.0, cutoff=0.0).at(index, 3).needs_negative for index in range(3))
    assert not Guidance(1.0).needs_negative
    assert needs_negative(1.5)
    assert not needs_negative(0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"cfg": -1.0},
        {"cfg": float("nan")},
        {"rescale": 1.1},
        {"cutoff": -0.1},
        {"cfg": float("inf")},
    ],
)
def test_guidance_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match="cfg"):
        Guidance(**options)
