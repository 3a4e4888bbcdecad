"""What a sampler says the picture is: exact at every call of a model that knows it."""

import numpy as np
import pytest
import torch

from diffquant.runtime.samplers import SAMPLERS, make_sampler
from diffquant.runtime.schedules import SchedulerFacts

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)
SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)


def level(t):
    """Weights of picture and noise of a diffusion's latents at a timestep, by the definition."""
    sigma = np.exp(np.interp(t, np.arange(1000), np.log(SIGMAS)))
    return 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)


def told(kind, shown, picture, t):
    """What a model that knows the picture answers."""
    if kind == "flow":
        return (shown - picture) / (t / 1000)
    a, s = level(t)
    noise = (shown - a * picture) / s
    return noise if kind == "epsilon" else a * noise - s * picture


CASES = [
    (name, kind)
    for name, row in SAMPLERS.items()
    for kind in (("flow",) if row.flow else ("epsilon", "v_prediction"))
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_estimate_of_a_model_that_knows_is_the_picture(name, kind):
    facts = SchedulerFacts.from_config(
        {"shift": 3.0} if kind == "flow" else {**SD, "prediction_type": kind, "clip_sample": False}
    )
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator)

    picture = draw((1, 4, 6, 5))
    run = make_sampler(name, facts, steps=6, tokens=30, flow=kind == "flow", draw=draw)
    x = draw(picture.shape) * run.init_scale
    for index, t in enumerate(run.timesteps):
        output = told(kind, run.scale_input(x, index), picture, t)
        before = x.clone()
        found = run.estimate(output, x, index)
        # at the top the picture has a hundredth of the weight that the noise has
        torch.testing.assert_close(found, picture, atol=2e-3, rtol=0)
        assert torch.equal(x, before)
        x = run.step(output, x, index)
    torch.testing.assert_close(x, picture, atol=0.15, rtol=0)
