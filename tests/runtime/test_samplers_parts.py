"""Runs that start or stop part-way, from a picture or for another model, against diffusers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffquant.core.errors import UsageError
from diffquant.runtime.levels import Levels, Part
from diffquant.runtime.samplers import SAMPLERS, make_sampler
from diffquant.runtime.schedules import SchedulerFacts

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
CLASSES = {
    "euler": ("EulerDiscreteScheduler", SD),
    "heun": ("HeunDiscreteScheduler", SD),
    "ddim": ("DDIMScheduler", {**SD, "clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SD),
    "unipc": ("UniPCMultistepScheduler", SD),
    "lcm": ("LCMScheduler", SD),
    "tcd": ("TCDScheduler", SD),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
}
STEPS = 9

# diffusers calls numpy.array on a tensor that does not know numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def model(x, t):
    return torch.sin(3 * x) * 0.4 + x * (0.3 + float(t) / 2000)


def tensor(seed):
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


def drawer():
    generator = torch.Generator().manual_seed(1)
    return lambda shape: torch.randn(shape, generator=generator)


def made(name, part, **options):
    flow = SAMPLERS[name].flow
    _, config = CLASSES.get(name, ("", {"shift": 3.0} if flow else SD))
    facts = SchedulerFacts.from_config(config)
    options = {"schedule": "normal" if flow else None, "draw": drawer(), **options}
    return make_sampler(name, facts, steps=STEPS, tokens=30, flow=flow, part=part, **options)


def run(sampler, x):
    passed = []
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_input(x, index), t), x, index)
        passed.append(x)
    return passed


@pytest.fixture
def theirs(oracle, monkeypatch):
    def make(name):
        scheduler_class, config = CLASSES[name]
        scheduler = getattr(oracle.diffusers, scheduler_class)(**config)
        draw = drawer()
        patched = f"{type(scheduler).__module__}.randn_tensor"
        monkeypatch.setattr(patched, lambda shape, **_: draw(tuple(shape)), raising=False)
        scheduler.set_timesteps(STEPS)
        return scheduler

    return make


def timesteps_of(scheduler, strength, start=None):
    """The pipelines' own choice of where to begin: SDXL's, or Flux's for flows."""
    from diffusers import FluxImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    holder = SimpleNamespace(scheduler=scheduler)
    if type(scheduler).__name__.startswith("Flow"):
        return FluxImg2ImgPipeline.get_timesteps(holder, STEPS, strength, "cpu")[0]
    choose = StableDiffusionXLImg2ImgPipeline.get_timesteps
    return choose(holder, STEPS, strength, "cpu", denoising_start=start)[0]


def run_theirs(scheduler, timesteps, x):
    passed = []
    for t in timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(shown, t), t, x, return_dict=False)[0]
        passed.append(x)
    return passed


def compare(oracle, ours, others):
    assert len(ours) == len(others)
    for mine, other in zip(ours, others, strict=True):
        oracle.assert_close(mine, other, 1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", CLASSES)
def test_a_run_from_a_picture_equals_diffusers(name, strength, oracle, theirs):
    scheduler, clean, noise = theirs(name), tensor(0), tensor(2)
    timesteps = timesteps_of(scheduler, strength)
    scale = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
    order = (
        (clean, timesteps[:1], noise) if scale == "scale_noise" else (clean, noise, timesteps[:1])
    )
    x = getattr(scheduler, scale)(*order)
    sampler = made(name, Part(strength=strength))
    np.testing.assert_allclose(sampler.timesteps, timesteps.numpy(), rtol=1e-5)
    started = sampler.add_noise(clean, noise, 0)
    oracle.assert_close(started, x)
    compare(oracle, run(sampler, started), run_theirs(scheduler, timesteps, x))


@pytest.mark.oracle
@pytest.mark.parametrize("share", [0.5, 0.555, 0.8])  # 0.555: the cut is a timestep
@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "unipc", "heun"])
def test_base_and_refiner_share_a_run_as_sdxl_does(name, share, oracle, theirs):
    base = theirs(name)
    cut = round(base.config.num_train_timesteps * (1 - share))  # denoising_end
    x = tensor(0) * base.init_noise_sigma
    early = list(base.timesteps[: len([t for t in base.timesteps if t >= cut])])
    first = made(name, Part(stop=share))
    second = made(name, Part(start=share))
    ours = run(first, tensor(0) * first.init_scale)
    if name == "heun":  # diffusers cuts a step in two here; ours ends after the whole one
        assert len(first.timesteps) % 2 == 0
        whole = made(name, Part())
        compare(oracle, ours + run(second, ours[-1]), run(whole, tensor(0) * whole.init_scale))
        return
    reached = run_theirs(base, early, x)
    compare(oracle, ours, reached)
    refiner = theirs(name)
    late = timesteps_of(refiner, 1.0, start=share)
    assert len(early) + len(late) == STEPS
    compare(oracle, run(second, ours[-1]), run_theirs(refiner, late, reached[-1]))


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "flow_euler", "flow_heun", "euler_a"])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_run_without_memory_may_be_cut_anywhere(name, at):
    draw = drawer()
    whole = made(name, Part(), draw=drawer())
    wanted = run(whole, tensor(0) * whole.init_scale)[-1]
    x = run(made(name, Part(end=at), draw=draw), tensor(0) * whole.init_scale)[-1]
    found = run(made(name, Part(begin=at), draw=draw), x)[-1]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"pndm"}))
def test_noise_of_the_level_that_a_run_reaches(name):
    """Where the model knows the truth, latents stay clean * a + noise * s with the level's own."""
    clean, noise = tensor(3), tensor(4)
    deterministic = not SAMPLERS[name].draws
    sampler = made(name, Part())
    x = sampler.add_noise(clean, noise, 0)
    for index in range(len(sampler.timesteps)):
        truth = noise - clean if SAMPLERS[name].flow else noise
        x = sampler.step(truth, x, index)
        if deterministic:
            wanted = sampler.add_noise(clean, noise, index + 1)
            torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-3)
        else:
            break
    if deterministic and name not in {"ddim"}:  # its last level keeps alpha 0 of the table
        torch.testing.assert_close(x, clean, rtol=1e-3, atol=1e-3)


def test_pndm_begins_part_way_with_its_own_second_timestep():
    facts = SchedulerFacts.from_config(SD)
    whole = make_sampler("pndm", facts, steps=4, tokens=1)
    assert whole.timesteps == (751.0, 501.0, 501.0, 251.0, 1.0)
    late = make_sampler("pndm", facts, steps=4, tokens=1, part=Part(begin=2))
    assert late.timesteps == (251.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"start": 0.8, "stop": 0.5}, "later stop"),
        ({"strength": 0.5, "begin": 2}, "give one"),
        ({"strength": 0.5, "start": 0.2}, "give one"),
    ],
)
def test_parts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Part(**options)


@pytest.mark.parametrize("part", [Part(strength=0.1), Part(begin=9), Part(end=12), Part(stop=0.01)])
def test_parts_without_a_step_are_refused(part):
    with pytest.raises(UsageError, match="no step is left of 9"):
        made("euler", part)


def test_levels_one_by_one_count_their_own_steps():
    facts = SchedulerFacts.from_config(SD)
    given = (999.0, 749.0, 499.0, 249.0)
    sampler = make_sampler(
        "lcm", facts, steps=30, tokens=1, schedule=Levels(timesteps=given), draw=drawer()
    )
    assert sampler.timesteps == given
    part = make_sampler(
        "ddim", facts, steps=1, tokens=1, schedule=Levels(timesteps=given), part=Part(strength=0.5)
    )
    assert part.timesteps == given[2:]
