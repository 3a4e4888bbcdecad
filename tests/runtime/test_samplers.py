"""Samplers against diffusers' schedulers over a made-up model: every latent on the way."""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.samplers import SAMPLERS, default_sampler, make_sampler
from diffquant.runtime.schedules import SchedulerFacts

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OFFSET = {"steps_offset": 1, "timestep_spacing": "leading"}
CLASSES = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
SPACINGS = [
    {},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
SPREADS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
EXTRA = {
    "ddim": [{"set_alpha_to_one": True, "clip_sample": False}, {"clip_sample": True}],
    "heun": [{"clip_sample": True}],
    "pndm": [{"set_alpha_to_one": True}],
    "dpmpp_2m": [{"lower_order_final": False, "euler_at_final": True}, {"solver_order": 1}],
    "unipc": [{"solver_order": 3}, {"solver_order": 1}],
    "lcm": [{"clip_sample": True}, {"original_inference_steps": 20}, {"timestep_scaling": 0.05}],
}
BASE = {
    "ddim": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
FINAL = {"euler", "dpmpp_2m", "unipc"}
NO_SAMPLE = {"euler_a", "dpmpp_sde", "pndm"}  # diffusers refuses x0 predictions there


def cases():
    for name in CLASSES:
        spacings = [{}] if name in {"lcm", "tcd"} else SPACINGS
        spreads = [] if name in {"euler_a", "ddim", "pndm", "lcm", "tcd"} else SPREADS
        final = [{"final_sigmas_type": "sigma_min"}] if name in FINAL else []
        kinds = [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}]
        kinds = kinds[:1] if name in NO_SAMPLE else kinds
        for changes in [*spacings, *spreads, *final, *kinds, *EXTRA.get(name, [])]:
            shown = ",".join(f"{key}={value}" for key, value in changes.items())
            for steps in (4, 9, 20) if changes in SPREADS else (1, 4, 9, 20):  # it needs two ends
                yield pytest.param(name, changes, steps, id=f"{name}-{shown}-{steps}")


# diffusers calls numpy.array on a tensor that does not know numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def model(x, t):
    return torch.sin(3 * x) * 0.4 + x * (0.3 + float(t) / 2000)


def latents():
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def drawer(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def run_ours(sampler, x, told=float):
    passed = []
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_input(x, index), told(t)), x, index)
        passed.append(x)
    return passed


def run_diffusers(scheduler, x, timesteps=None, **options):
    passed = []
    for t in scheduler.timesteps if timesteps is None else timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(shown, t), t, x, return_dict=False, **options)[0]
        passed.append(x)
    return passed


class Brownian:
    """A path over sigma, made of the draws of its smallest increments."""

    def __init__(self, draw):
        self.draw, self.half = draw, None

    def __call__(self, sigma, following):
        sigma, following = float(sigma), float(following)
        if self.half is None:
            self.half = (sigma, following, self.draw((2, 4, 5, 6)))
            return self.half[2]
        top, middle, first = self.half
        self.half = None
        assert top == pytest.approx(sigma)
        second = self.draw((2, 4, 5, 6))
        grown = first * (top - middle) ** 0.5 + second * (middle - following) ** 0.5
        return grown / (top - following) ** 0.5


@pytest.fixture
def scheduler_of(oracle, monkeypatch):
    """Make a scheduler of diffusers that draws its noise from `drawer()`."""

    def make(name, config):
        if name == "dpmpp_sde":  # needs torchsde for its Brownian tree, which ours replaces
            monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
            monkeypatch.setattr("diffusers.utils.import_utils._torchsde_available", True)
            module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
            return getattr(module, CLASSES[name])(**config)
        scheduler = getattr(oracle.diffusers, CLASSES[name])(**config)
        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            draw = drawer()
            fake = lambda shape, **_: draw(tuple(shape))  # noqa: E731
            monkeypatch.setattr(module, "randn_tensor", fake)
        return scheduler

    return make


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "changes", "steps"), list(cases()))
def test_diffusion_samplers_equal_diffusers(name, changes, steps, oracle, scheduler_of):
    config = {**SD, **BASE.get(name, {}), **changes}
    scheduler = scheduler_of(name, config)
    scheduler.set_timesteps(steps)
    if name == "dpmpp_sde":
        scheduler.noise_sampler = Brownian(drawer())
    sampler = make_sampler(
        name, SchedulerFacts.from_config(config), steps=steps, tokens=30, draw=drawer()
    )
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=2e-3)
    theirs = run_diffusers(scheduler, latents() * scheduler.init_noise_sigma)
    ours = run_ours(sampler, latents() * sampler.init_scale)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        oracle.assert_close(mine, other, 1e-4)


def test_default_sampler_follows_the_checkpoint():
    assert default_sampler(SchedulerFacts(), flow=False) == "euler"
    assert default_sampler(SchedulerFacts(), flow=True) == "flow_euler"
    for name, row in SAMPLERS.items():
        for one in row.classes:
            assert default_sampler(SchedulerFacts(name=one), flow=row.flow) == name
    sde = SchedulerFacts(name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    assert default_sampler(sde, flow=False) == "dpmpp_2m_sde"
    with pytest.raises(UsageError, match=r"LMSDiscreteScheduler.*ddim, euler"):
        default_sampler(SchedulerFacts(name="LMSDiscreteScheduler"), flow=False)


def test_samplers_of_the_wrong_kind_and_unknown_ones_are_refused():
    with pytest.raises(UsageError, match="fitting: flow_euler"):
        make_sampler("ddim", SchedulerFacts(), steps=2, tokens=1, flow=True)
    with pytest.raises(UsageError, match="fitting: ddim, euler"):
        make_sampler("flow_euler", SchedulerFacts(), steps=2, tokens=1)
    with pytest.raises(UnknownFormat, match="did you mean 'euler'"):
        make_sampler("eular", SchedulerFacts(), steps=2, tokens=1)
