"""Schedules and samplers against diffusers' schedulers, over a made-up model."""

import numpy as np
import pytest
import torch

from diffquant.core.errors import ArchitectureError, UnknownFormat, UsageError
from diffquant.runtime.samplers import SAMPLERS, default_sampler, make_sampler
from diffquant.runtime.schedules import SchedulerFacts, flow_sigmas, timesteps

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
CLASSES = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}
DIFFUSION = [
    ("euler", {}),
    ("euler", {"timestep_spacing": "trailing"}),
    ("euler", {"timestep_spacing": "linspace"}),
    ("euler", {"timestep_spacing": None}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"prediction_type": "v_prediction"}),
    ("euler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ("ddim", {"set_alpha_to_one": False, "clip_sample": False}),
    ("ddim", {"set_alpha_to_one": True, "clip_sample": False}),
    ("ddim", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("ddim", {"clip_sample": False, "timestep_spacing": "linspace"}),
    ("ddim", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("ddim", {}),
    ("pndm", {"skip_prk_steps": True}),
    ("pndm", {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 0}),
    ("pndm", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
]


# diffusers calls numpy.array on a tensor that does not know numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def model(x, t):
    return torch.sin(3 * x) * 0.4 + x * (0.3 + float(t) / 2000)


def run_ours(sampler, noise):
    x = noise * sampler.init_scale
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_input(x, index), t), x, index)
    return x


def run_diffusers(scheduler, noise):
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(shown, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4, 13, 30])
@pytest.mark.parametrize(("name", "changes"), DIFFUSION)
def test_diffusion_samplers_equal_diffusers(name, changes, steps, oracle):
    config = {k: v for k, v in {**SD, **changes}.items() if v is not None}
    scheduler = getattr(oracle.diffusers, CLASSES[name])(**config)
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    facts = SchedulerFacts.from_config(config)
    sampler = make_sampler(name, facts, steps=steps, tokens=30)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    oracle.assert_close(run_ours(sampler, noise), run_diffusers(scheduler, noise), 2e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("tokens", [32, 1024, 4096])
@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"shift": 3.0, "use_dynamic_shifting": True},
        {
            "use_dynamic_shifting": True,
            "base_shift": 0.3,
            "max_shift": 0.9,
            "max_image_seq_len": 8192,
        },
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 2.0, "shift_terminal": 0.02},
    ],
)
def test_flow_equals_diffusers_as_the_flux_pipeline_drives_it(changes, tokens, steps, oracle):
    if changes.get("shift_terminal") and steps == 1:
        pytest.skip("diffusers divides by zero: one step cannot begin at 1 and end elsewhere")
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
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler(
        "euler", SchedulerFacts.from_config(changes), steps=steps, tokens=tokens, flow=True
    )
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-5)
    oracle.assert_close(run_ours(sampler, noise), run_diffusers(scheduler, noise))


def test_pndm_visits_the_second_timestep_twice():
    sampler = make_sampler("pndm", SchedulerFacts(), steps=4, tokens=1)
    assert sampler.timesteps == (751.0, 501.0, 501.0, 251.0, 1.0)


def test_a_silent_config_takes_each_class_default():
    silent = SchedulerFacts.from_config({"_class_name": "PNDMScheduler"})
    assert make_sampler("euler", silent, steps=2, tokens=1).timesteps == (999.0, 0.0)
    assert make_sampler("ddim", silent, steps=2, tokens=1).timesteps == (500.0, 0.0)


def test_default_sampler_follows_the_checkpoint():
    assert default_sampler(SchedulerFacts(), flow=False) == "euler"
    assert default_sampler(SchedulerFacts(), flow=True) == "flow_euler"
    for name, row in SAMPLERS.items():
        facts = SchedulerFacts(name=row.classes[0])
        assert default_sampler(facts, flow=row.flow) == name
    with pytest.raises(UsageError, match=r"HeunDiscreteScheduler.*ddim, euler"):
        default_sampler(SchedulerFacts(name="HeunDiscreteScheduler"), flow=False)


def test_samplers_of_the_wrong_kind_and_unknown_ones_are_refused():
    with pytest.raises(UsageError, match="fitting: flow_euler"):
        make_sampler("ddim", SchedulerFacts(), steps=2, tokens=1, flow=True)
    with pytest.raises(UnknownFormat, match="did you mean 'euler'"):
        make_sampler("eular", SchedulerFacts(), steps=2, tokens=1)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(UsageError, match="steps must be"):
        timesteps(SchedulerFacts(), steps, "leading")


def test_all_timesteps_stay_inside_the_table():
    assert timesteps(SchedulerFacts(), 1000, "leading").max() == 999
    with pytest.raises(UsageError, match="known: leading"):
        timesteps(SchedulerFacts(), 10, "middle")


def test_flow_needs_a_step():
    with pytest.raises(UsageError, match="at least 1"):
        flow_sigmas(SchedulerFacts(), 0, 16)
    with pytest.raises(ArchitectureError, match="use_karras_sigmas"):
        flow_sigmas(SchedulerFacts(use_karras_sigmas=True), 4, 16)


@pytest.mark.parametrize(
    "config",
    [{"use_beta_sigmas": True}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1]}],
)
def test_config_fields_that_would_be_ignored_are_refused(config):
    with pytest.raises(ArchitectureError, match=next(iter(config))):
        SchedulerFacts.from_config(config)


def test_unknown_predictions_and_schedules_are_refused():
    sampler = make_sampler("euler", SchedulerFacts(prediction_type="sample"), steps=1, tokens=1)
    with pytest.raises(ArchitectureError, match="prediction type 'sample'"):
        sampler.step(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ArchitectureError, match="squaredcos"):
        make_sampler("ddim", SchedulerFacts(beta_schedule="squaredcos_cap_v2"), steps=1, tokens=1)
