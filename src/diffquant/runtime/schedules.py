"""Noise schedules: which noise levels a model was trained on, and which of them a run visits.

Two kinds. Diffusion models (SD) know 1000 timesteps with a table of alphas; a run picks some of
them (`spacing`). Flow models (Flux) know a continuous time from 1 (noise) to 0; a run walks evenly
and then bends the walk towards noise (`shift`), more so for larger pictures when the shift is
dynamic.

Facts are read from a scheduler_config.json as it is; where one is silent, each sampler takes the
default that diffusers' class of that name has, so the same folder gives the same picture in both.
Source: huggingface/diffusers
schedulers/scheduling_{ddim,euler_discrete,flow_match_euler_discrete}.py and
pipelines/flux/pipeline_flux.py (calculate_shift); spacing: arXiv:2305.08891 table 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffquant.core.errors import ArchitectureError, UsageError

__all__ = [
    "SPACINGS",
    "SchedulerFacts",
    "alphas_cumprod",
    "flow_shift",
    "flow_sigmas",
    "karras_sigmas",
    "timesteps",
]

SPACINGS = ("leading", "trailing", "linspace")

# Fields of a scheduler config that change the result and are not implemented, with their neutral
# values.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "trained_betas": (),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "timestep_type": ("discrete",),
    "skip_prk_steps": (True,),
    "time_shift_type": ("exponential", "linear"),
}


@dataclass(frozen=True, slots=True)
class SchedulerFacts:
    """What a checkpoint says about its schedule; the defaults are SD1.5's and Flux schnell's.

    Attributes:
        name: diffusers class the checkpoint names, "" if it names none.
        timestep_spacing, set_alpha_to_one, clip_sample: None where the config is silent.
        use_karras_sigmas: whether Euler spaces its sigmas as Karras et al. do.
        shift: static flow shift, used unless `use_dynamic_shifting`.
        base_image_seq_len, max_image_seq_len: tokens at which the dynamic shift is base_shift,
            max_shift.
    """

    name: str = ""
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    clip_sample: bool | None = False
    clip_sample_range: float = 1.0
    use_karras_sigmas: bool = False
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SchedulerFacts:
        """Read a scheduler_config.json.

        Raises:
            ArchitectureError: a field asks for what is not implemented.
        """
        for name, neutral in _NEUTRAL.items():
            value = config.get(name)
            if value is not None and value not in neutral:
                raise ArchitectureError(f"scheduler config field {name}={value!r} is not supported")
        silent: dict[str, Any] = {
            "timestep_spacing": None,
            "set_alpha_to_one": None,
            "clip_sample": None,
            "steps_offset": 0,
        }
        fields = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if key in fields and value is not None}
        return cls(**{**silent, **given, "name": str(config.get("_class_name") or "")})


def alphas_cumprod(facts: SchedulerFacts) -> Tensor:
    """Cumulative product of 1 - beta over the training timesteps: (num_train_timesteps,) float32.

    A torch tensor, and computed in float32 with all its rounding: other programs do the same, and
    chaotic runs make pictures out of a last bit.
    """
    count, first, last = facts.num_train_timesteps, facts.beta_start, facts.beta_end
    match facts.beta_schedule:
        case "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
        case "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float32)
        case other:
            known = "scaled_linear, linear"
            raise ArchitectureError(f"beta schedule {other!r} is not supported (known: {known})")
    return torch.cumprod(1.0 - betas, dim=0)


def timesteps(facts: SchedulerFacts, steps: int, spacing: str) -> NDArray[np.float32]:
    """Training timesteps a run of `steps` visits, noisiest first: (steps,) float32.

    Args:
        facts: the schedule; `steps_offset` applies to leading spacing only.
        steps: 1 to num_train_timesteps.
        spacing: one of SPACINGS; `linspace` gives fractions. An offset never leaves the table.
    """
    count = facts.num_train_timesteps
    if not 1 <= steps <= count:
        raise UsageError(f"steps must be between 1 and {count}, found {steps}")
    match spacing:
        case "leading":
            picked = np.arange(steps)[::-1] * float(count // steps) + facts.steps_offset
        case "trailing":
            picked = np.round(np.arange(count, 0, -count / steps)) - 1
        case "linspace":
            picked = np.linspace(0, count - 1, steps)[::-1]
        case _:
            raise UsageError(f"unknown timestep spacing {spacing!r} (known: {', '.join(SPACINGS)})")
    inside: NDArray[np.float32] = np.minimum(picked, count - 1).astype(np.float32)
    return inside


def karras_sigmas(first: float, last: float, steps: int) -> NDArray[np.float64]:
    """Noise levels from `first` down to `last`, evenly spaced in their seventh root: (steps,).

    Source: arXiv:2206.00364 equation 5, rho = 7.
    """
    roots = np.linspace(first ** (1 / 7), last ** (1 / 7), steps)
    levels: NDArray[np.float64] = roots**7
    return levels


def flow_shift(facts: SchedulerFacts, tokens: int) -> float:
    """The factor by which a flow schedule leans towards noise, for a picture of `tokens` tokens."""
    if not facts.use_dynamic_shifting:
        return facts.shift
    span = facts.max_image_seq_len - facts.base_image_seq_len
    slope = (facts.max_shift - facts.base_shift) / span
    mu = facts.base_shift + slope * (tokens - facts.base_image_seq_len)
    return math.exp(mu) if facts.time_shift_type == "exponential" else mu


def flow_sigmas(facts: SchedulerFacts, steps: int, tokens: int) -> NDArray[np.float32]:
    """Flow times of a run, from noise to picture: (steps + 1,) float32, the last 0.

    sigma' = s sigma / (1 + (s - 1) sigma) with s from `flow_shift`, over sigmas spaced evenly from
    1 to 1 / steps; then stretched so that the last one is `shift_terminal`, if there is one.
    """
    if facts.use_karras_sigmas:
        raise ArchitectureError(
            "scheduler config field use_karras_sigmas is not supported for flows"
        )
    if steps < 1:
        raise UsageError(f"steps must be at least 1, found {steps}")
    even = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shift = flow_shift(facts, tokens)
    if facts.use_dynamic_shifting:  # the same curve, in the order of operations diffusers uses
        sigmas = shift / (shift + (1 / even - 1))
    else:
        sigmas = shift * even / (1 + (shift - 1) * even)
    if facts.shift_terminal and steps > 1:  # a single step begins at 1, it cannot end elsewhere
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - facts.shift_terminal))
    appended: NDArray[np.float32] = np.append(sigmas, 0.0).astype(np.float32)
    return appended
