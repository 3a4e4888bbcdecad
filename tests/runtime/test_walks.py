"""Schedules over the table of a diffusion model, against their definitions computed here."""

import numpy as np
import pytest
import torch

from diffquant.core.errors import ArchitectureError, UnknownFormat, UsageError
from diffquant.runtime.levels import Levels
from diffquant.runtime.samplers import make_sampler
from diffquant.runtime.schedules import SchedulerFacts, alphas_cumprod, sigma_table, timesteps
from diffquant.runtime.walks import diffusion_walk

SD = SchedulerFacts.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


# diffusers calls numpy.array on a tensor that does not know numpy 2's copy keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def table():
    """SD's 1000 noise levels in float64, from the definition."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def quantile(share, a=0.6):
    """Quantile of the beta distribution with both parameters `a`, by summing its density.

    The substitution x = sin(u)**2 takes the poles at both ends away for a > 1/2.
    """
    u = np.linspace(0, np.pi / 2, 200_001)
    density = (np.sin(u) * np.cos(u)) ** (2 * a - 1)
    grown = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sin(np.interp(share, grown / grown[-1], u)) ** 2


def at(table, places):
    """Levels between whole timesteps, even in the logarithm."""
    return np.exp(np.interp(places, np.arange(len(table)), np.log(table)))


@pytest.mark.parametrize("steps", [1, 4, 10, 20, 30])
def test_schedules_of_comfyui_by_their_definition(steps, table):
    beta = np.rint(quantile(1 - np.arange(steps) / steps) * 999)
    places = {
        "normal": np.linspace(999, 0, steps),
        "sgm_uniform": np.linspace(999, 0, steps + 1)[:-1],
        "simple": [999 - int(i * 1000 / steps) for i in range(steps)],
        "ddim_uniform": list(range(1, 1000, 1000 // steps))[::-1],
        "beta": beta,
    }
    for name, told in places.items():
        walk = diffusion_walk(SD, steps, name)
        np.testing.assert_allclose(walk.timesteps, [*told, 0], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(walk.sigmas, [*at(table, told), 0], rtol=2e-5, err_msg=name)
        assert walk.unit


def test_known_values_of_sd_in_ten_steps():
    """Ends of SD's table, 14.6146 and 0.0292, and the places between as ComfyUI shows them."""
    karras = diffusion_walk(SD, 10, "karras").sigmas
    assert karras[0] == pytest.approx(14.6146, abs=1e-4)
    assert karras[-2:] == pytest.approx((0.0292, 0.0), abs=1e-4)
    roots = np.array(karras[:-1]) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-4)
    assert diffusion_walk(SD, 10, "beta").timesteps[1] == pytest.approx(
        np.rint(quantile(0.9) * 999)
    )
    halves = np.diff(np.log(diffusion_walk(SD, 10, "exponential").sigmas[:-1]))
    np.testing.assert_allclose(halves, halves[0], rtol=1e-4)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_ays_of_ten_steps_is_what_was_published(architecture):
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_utils import AysSchedules

    key = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}[architecture]
    walk = diffusion_walk(SD, 10, "ays", architecture=architecture)
    np.testing.assert_allclose(walk.sigmas, AysSchedules[f"{key}Sigmas"], rtol=1e-6)
    # the timesteps they list are these, to a few
    np.testing.assert_allclose(walk.timesteps[:-1], AysSchedules[f"{key}Timesteps"], atol=6)
    finer = diffusion_walk(SD, 20, "ays", architecture=architecture)
    assert len(finer.sigmas) == 21
    assert all(a > b for a, b in zip(finer.sigmas, finer.sigmas[1:], strict=False))
    with pytest.raises(UsageError, match="levels for sd15, sdxl"):
        diffusion_walk(SD, 10, "ays", architecture="sd3")


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_ays_run_equals_diffusers_over_the_same_sigmas(architecture, oracle):
    scheduler = oracle.diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    sampler = make_sampler(
        "euler", SD, steps=10, tokens=1, schedule="Align Your Steps", architecture=architecture
    )
    scheduler.set_timesteps(sigmas=list(sampler.levels))
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), atol=1e-3)


@pytest.mark.oracle
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc", "euler_a"])
def test_a_terminal_snr_of_zero_equals_diffusers(name, spacing, oracle, monkeypatch):
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
    }
    classes = {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
        "euler_a": "EulerAncestralDiscreteScheduler",
    }
    config |= {"clip_sample": False} if name == "ddim" else {}
    scheduler = getattr(oracle.diffusers, classes[name])(**config)
    zeros = lambda shape, **_: torch.zeros(tuple(shape))  # noqa: E731
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", zeros, raising=False)
    scheduler.set_timesteps(6)
    facts = SchedulerFacts.from_config(config)
    sampler = make_sampler(name, facts, steps=6, tokens=1, draw=zeros)
    noise = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x, y = noise * sampler.init_scale, noise * scheduler.init_noise_sigma
    for index, (t, mine) in enumerate(zip(scheduler.timesteps, sampler.timesteps, strict=True)):
        assert mine == pytest.approx(float(t), abs=1e-3)
        x = sampler.step(torch.sin(sampler.scale_input(x, index)), x, index)
        y = scheduler.step(torch.sin(scheduler.scale_model_input(y, t)), t, y).prev_sample
        # ancestral steps cancel latents that begin 4096 strong: float32 keeps 1e-3 of them
        oracle.assert_close(x, y, 2e-3 if name == "euler_a" else 1e-4)


def test_a_terminal_snr_of_zero_keeps_the_first_level():
    rescaled = SchedulerFacts(rescale_betas_zero_snr=True)
    alphas = alphas_cumprod(rescaled)
    assert float(alphas[-1]) == 0.0
    assert float(alphas[0]) == pytest.approx(float(alphas_cumprod(SchedulerFacts())[0]), rel=1e-6)
    assert sigma_table(rescaled)[-1] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_a_prediction_of_noise_cannot_start_from_noise_alone(name):
    facts = SchedulerFacts(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    sampler = make_sampler(name, facts, steps=4, tokens=1)
    with pytest.raises(UsageError, match="signal of zero"):
        sampler.step(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize(
    "levels",
    [
        {},
        {"timesteps": (1.0,), "sigmas": (1.0,)},
        {"timesteps": (10.0, 10.0)},
        {"timesteps": (10.0, 20.0)},
        {"sigmas": (1.0, 0.0)},
        {"sigmas": (float("nan"),)},
        {"sigmas": (float("inf"), 1.0)},
        {"timesteps": (10.0, -1.0)},
    ],
)
def test_levels_that_do_not_fall_are_refused(levels):
    with pytest.raises(UsageError, match=r"levels must fall|either timesteps or sigmas"):
        Levels(**levels)


def test_levels_outside_the_table_are_refused():
    with pytest.raises(UsageError, match="outside the table, which ends at 999"):
        diffusion_walk(SD, 1, Levels(timesteps=(1000.0, 1.0)))
    for sigmas in ((20.0, 1.0), (14.0, 0.001)):
        with pytest.raises(UsageError, match=r"outside the table, which goes from 14.6146 to 0.02"):
            diffusion_walk(SD, 1, Levels(sigmas=sigmas))


def test_sigmas_one_by_one_find_their_timesteps(table):
    walk = diffusion_walk(SD, 1, Levels(sigmas=(float(table[900]), float(table[10]))))
    np.testing.assert_allclose(walk.timesteps, [900, 10, 0], atol=1e-2)


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("schedule", [None, "leading", "simple", "karras"])
def test_impossible_step_counts_are_refused(steps, schedule):
    with pytest.raises(UsageError, match="steps must be"):
        diffusion_walk(SD, steps, schedule)


def test_all_timesteps_stay_inside_the_table():
    assert timesteps(SchedulerFacts(), 1000, "leading").max() == 999
    with pytest.raises(UsageError, match="known: leading"):
        timesteps(SchedulerFacts(), 10, "middle")
    with pytest.raises(UnknownFormat, match="schedule 'middle'"):
        diffusion_walk(SD, 10, "middle")


def test_schedules_that_cannot_hold_the_steps_are_refused():
    with pytest.raises(UsageError, match="too many for the beta schedule"):
        diffusion_walk(SD, 500, "beta")
    with pytest.raises(UsageError, match="between 1 and 50"):
        diffusion_walk(SD, 51, "lcm")
    with pytest.raises(UsageError, match="evenly spaced"):
        make_sampler("pndm", SD, steps=10, tokens=1, schedule="karras")


def test_a_silent_config_takes_each_class_default():
    silent = SchedulerFacts.from_config({"_class_name": "PNDMScheduler"})
    assert make_sampler("euler", silent, steps=2, tokens=1).timesteps == (999.0, 0.0)
    assert make_sampler("ddim", silent, steps=2, tokens=1).timesteps == (500.0, 0.0)
    assert make_sampler("dpmpp_2m", silent, steps=2, tokens=1).timesteps == (999.0, 500.0)


@pytest.mark.parametrize(
    "config",
    [
        {"thresholding": True},
        {"trained_betas": [0.1]},
        {"algorithm_type": "dpmsolver"},
        {"solver_type": "heun"},
        {"lambda_min_clipped": -5.1},
        {"predict_x0": False},
    ],
)
def test_config_fields_that_would_be_ignored_are_refused(config):
    with pytest.raises(ArchitectureError, match=next(iter(config))):
        SchedulerFacts.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 10**15}, "between 1 and 100000"),
        ({"num_train_timesteps": "1000"}, "must be int"),
        ({"num_train_timesteps": True}, "must be int"),
        ({"num_train_timesteps": 1000.5}, "must be int"),
        ({"beta_start": float("nan")}, "between 1e-12"),
        ({"beta_end": [0.1]}, "must be float"),
        ({"beta_schedule": 3}, "must be str"),
        ({"steps_offset": -1}, "between 0"),
        ({"clip_sample": "no"}, "must be bool"),
        ({"shift": 0}, "between 1e-06"),
        ({"shift_terminal": 1.0}, "between 0 and 0.999"),
        ({"use_flow_sigmas": True, "flow_shift": "3"}, "shift='3' must be float"),
    ],
)
def test_hostile_configs_are_refused(config, message):
    with pytest.raises(ArchitectureError, match=message):
        SchedulerFacts.from_config(config)


def test_a_dynamic_shift_needs_two_sizes():
    facts = SchedulerFacts(use_dynamic_shifting=True, max_image_seq_len=256)
    with pytest.raises(ArchitectureError, match="max_image_seq_len must be above"):
        make_sampler("euler", facts, steps=4, tokens=256, flow=True)


def test_a_config_that_contradicts_itself_is_refused():
    facts = SchedulerFacts.from_config({"use_karras_sigmas": True, "use_beta_sigmas": True})
    with pytest.raises(ArchitectureError, match="karras, beta_sigmas"):
        diffusion_walk(facts, 4, None)
    third = SchedulerFacts.from_config({"solver_order": 3})
    with pytest.raises(UsageError, match="order 3 of DPM"):
        make_sampler("dpmpp_2m", third, steps=4, tokens=1)


def test_unknown_predictions_and_schedules_are_refused():
    sampler = make_sampler("euler", SchedulerFacts(prediction_type="noise"), steps=1, tokens=1)
    with pytest.raises(ArchitectureError, match="prediction type 'noise'"):
        sampler.step(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ArchitectureError, match="squaredcos"):
        make_sampler("ddim", SchedulerFacts(beta_schedule="squaredcos_cap_v2"), steps=1, tokens=1)


def test_noise_and_eta_are_asked_for_where_they_are_needed():
    with pytest.raises(UsageError, match="adds noise of its own"):
        make_sampler("euler_a", SD, steps=4, tokens=1)
    with pytest.raises(UsageError, match="adds noise of its own"):
        make_sampler("ddim", SD, steps=4, tokens=1, eta=0.5)
    with pytest.raises(UsageError, match="takes no eta"):
        make_sampler("euler", SD, steps=4, tokens=1, eta=0.5)
    with pytest.raises(UsageError, match="eta must be"):
        make_sampler("tcd", SD, steps=4, tokens=1, eta=1.5, draw=torch.zeros)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "eta"), [("ddim", 0.5), ("ddim", 1.0), ("tcd", 0.0), ("tcd", 1.0)]
)
def test_eta_equals_diffusers(name, eta, oracle, monkeypatch):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config |= {"clip_sample": False} if name == "ddim" else {}
    scheduler = getattr(oracle.diffusers, f"{name.upper()}Scheduler")(**config)
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    fake = lambda shape, **_: torch.randn(tuple(shape), generator=theirs)  # noqa: E731
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", fake)
    scheduler.set_timesteps(5)
    sampler = make_sampler(
        name,
        SchedulerFacts.from_config(config),
        steps=5,
        tokens=1,
        eta=eta,
        draw=lambda shape: torch.randn(shape, generator=ours),
    )
    x = y = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(scheduler.timesteps):
        x = sampler.step(torch.sin(x), x, index)
        y = scheduler.step(torch.sin(y), t, y, eta=eta).prev_sample
        oracle.assert_close(x, y, 1e-4)
