"""Samplers of flows against diffusers' schedulers, driven as its pipelines drive them."""

import sys

import numpy as np
import pytest
import torch

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.levels import Levels
from diffquant.runtime.samplers import make_sampler
from diffquant.runtime.schedules import SchedulerFacts, flow_shift, flux2_mu
from diffquant.runtime.walks import flow_walk

# diffusers calls numpy.array on a tensor that does not know numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DYNAMIC = {"use_dynamic_shifting": True}
STATIC = [{"shift": 1.0}, {"shift": 3.0}]


def model(x, t):
    return torch.sin(3 * x) * 0.4 + x * (0.3 + float(t) / 2000)


def latents():
    return torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))


def drawer():
    generator = torch.Generator().manual_seed(1)
    return lambda shape: torch.randn(shape, generator=generator)


def run_ours(sampler, told=None):
    x, passed = latents(), []
    assert sampler.init_scale == 1.0
    for index, t in enumerate(sampler.timesteps if told is None else told):
        x = sampler.step(model(sampler.scale_input(x, index), t), x, index)
        passed.append(x)
    return passed


def run_diffusers(scheduler):
    x, passed = latents(), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        passed.append(x)
    return passed


def compare(oracle, sampler, scheduler, told=None):
    ours, theirs = run_ours(sampler, told), run_diffusers(scheduler)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        oracle.assert_close(mine, other, 1e-4)


def made(name, config, steps, **options):
    facts = SchedulerFacts.from_config(config)
    return make_sampler(name, facts, steps=steps, flow=True, **{"tokens": 1024, **options})


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("tokens", [32, 4096])
@pytest.mark.parametrize(
    "changes",
    [
        *STATIC,
        {"shift": 3.0, **DYNAMIC},
        {**DYNAMIC, "base_shift": 0.3, "max_shift": 0.9, "max_image_seq_len": 8192},
        {**DYNAMIC, "time_shift_type": "linear"},
        {"shift": 2.0, "shift_terminal": 0.02},
        {**DYNAMIC, "shift_terminal": 0.02},
        {"shift": 3.0, "use_karras_sigmas": True},
        {"shift": 3.0, "use_exponential_sigmas": True},
        {**DYNAMIC, "use_beta_sigmas": True},
    ],
)
def test_euler_equals_diffusers_as_flux_and_qwen_drive_it(changes, tokens, steps, oracle):
    if steps == 1:  # diffusers divides by zero: one step cannot begin at 1 and end elsewhere
        changes = {key: value for key, value in changes.items() if key != "shift_terminal"}
    scheduler = oracle.diffusers.FlowMatchEulerDiscreteScheduler(**changes)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sampler = made("euler", changes, steps, tokens=tokens)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-5)
    compare(oracle, sampler, scheduler)


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("changes", STATIC)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_schedule_normal_equals_diffusers_as_sd3_drives_it(name, changes, steps, oracle):
    wanted = f"FlowMatch{name.title()}DiscreteScheduler"
    scheduler = getattr(oracle.diffusers, wanted)(**changes)
    scheduler.set_timesteps(steps)
    sampler = made(name, changes, steps, schedule="normal")
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-5)
    compare(oracle, sampler, scheduler)


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("euler_a", "LTXEulerAncestralRFScheduler"), ("lcm", "FlowMatchLCMScheduler")],
)
def test_stochastic_samplers_equal_diffusers(name, wanted, steps, oracle, monkeypatch):
    scheduler = getattr(oracle.diffusers, wanted)()
    draw = drawer()
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: draw(tuple(shape)))
    sampler = made(name, {"shift": 3.0}, steps, draw=drawer())
    levels = list(sampler.levels)
    scheduler.set_timesteps(sigmas=levels if name == "euler_a" else levels[:-1])
    if name == "euler_a":  # it lists the end as a timestep
        scheduler.timesteps = scheduler.timesteps[:-1]
    compare(oracle, sampler, scheduler)


def test_euler_a_without_fresh_noise_is_euler():
    plain = run_ours(made("euler", {"shift": 3.0}, 5))
    still = run_ours(made("euler_a", {"shift": 3.0}, 5, eta=0.0, draw=drawer()))
    for mine, other in zip(still, plain, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [4, 9, 20])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpmpp_equals_diffusers_over_its_own_flow_times(name, steps, oracle, monkeypatch):
    algorithm = "sde-dpmsolver++" if name.endswith("sde") else "dpmsolver++"
    config = {
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "algorithm_type": algorithm,
    }
    scheduler = oracle.diffusers.DPMSolverMultistepScheduler(**config)
    draw = drawer()
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: draw(tuple(shape)))
    scheduler.set_timesteps(steps)
    levels = Levels(sigmas=tuple(scheduler.sigmas[:-1].tolist()))
    sampler = made(name, config, steps, schedule=levels, draw=drawer())
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), atol=1)
    compare(oracle, sampler, scheduler, told=scheduler.timesteps)  # whole ones, by cutting off


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers_from_pure_noise(order, steps, oracle):
    config = {
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "solver_order": order,
    }
    scheduler = oracle.diffusers.UniPCMultistepScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    sampler = made("unipc", config, steps)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), atol=1.001)
    compare(oracle, sampler, scheduler, told=scheduler.timesteps)  # whole ones, by cutting off


@pytest.mark.oracle
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 4300, 4301, 9000])
@pytest.mark.parametrize("steps", [4, 8, 28, 50])
def test_the_shift_of_flux2_equals_diffusers(tokens, steps, oracle):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)
    facts = SchedulerFacts(use_dynamic_shifting=True, shift_rule="flux2")
    assert flow_shift(facts, tokens, steps) == pytest.approx(np.exp(flux2_mu(tokens, steps)))


@pytest.mark.oracle
def test_given_levels_equal_diffusers_with_and_without_the_shift(oracle):
    given = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
    scheduler = oracle.diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    scheduler.set_timesteps(sigmas=list(given), mu=flux2_mu(4096, 8))
    facts = SchedulerFacts.from_config({**DYNAMIC, "shift_rule": "flux2"})
    walk = flow_walk(facts, 1, Levels(sigmas=given, bent=True), tokens=4096)
    np.testing.assert_allclose(walk.sigmas, scheduler.sigmas.numpy(), rtol=1e-5)
    walk = flow_walk(facts, 1, Levels(sigmas=given), tokens=4096)
    np.testing.assert_allclose(walk.sigmas, (*given, 0.0), rtol=1e-6)


def shifted(t, shift=3.0):
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (None, [1, 0.75, 0.5, 0.25]),
        ("simple", [1, 0.75, 0.5, 0.25]),
        ("sgm_uniform", np.linspace(1, shifted(0.001), 5)[:-1]),
        ("normal", np.linspace(1, shifted(0.001), 4)),
        # rint(999 * ppf(1 - i / 4; 0.6, 0.6)) = 999, 823, 500, 176 of a table that begins at 1
        ("beta", [1, 0.824, 0.501, 0.177]),
        ("ddim_uniform", [0.752, 0.502, 0.252, 0.002]),
    ],
)
def test_schedules_of_comfyui_over_a_shifted_table(schedule, times):
    facts = SchedulerFacts(shift=3.0)
    walk = flow_walk(facts, 4, schedule, tokens=1)
    wanted = [*(shifted(t) for t in times), 0.0]
    np.testing.assert_allclose(walk.sigmas, wanted, rtol=1e-5)


def test_a_shift_of_ones_own_replaces_the_checkpoints():
    facts = {"shift": 5.0, **DYNAMIC}
    sampler = made("euler", facts, 4, shift=3.0)
    np.testing.assert_allclose(sampler.timesteps[1], 1000 * shifted(0.75), rtol=1e-6)
    with pytest.raises(UsageError, match="above 0"):
        made("euler", facts, 4, shift=0.0)
    with pytest.raises(UsageError, match="belongs to flow models"):
        make_sampler("euler", SchedulerFacts(), steps=4, tokens=1, shift=3.0)


def test_what_a_flow_cannot_do_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        made("euler", {}, 0)
    with pytest.raises(UnknownFormat, match="schedule for flows 'ays'"):
        made("euler", {}, 4, schedule="ays")
    with pytest.raises(UsageError, match="no training timesteps"):
        made("euler", {}, 4, schedule=Levels(timesteps=(999.0, 1.0)))
    with pytest.raises(UsageError, match="between 0 and 1"):
        made("euler", {}, 4, schedule=Levels(sigmas=(14.6, 1.0)))
