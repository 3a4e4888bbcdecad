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
    "bend",
    "flow_shift",
    "flux2_mu",
    "sigma_table",
    "timesteps",
]

SPACINGS = ("leading", "trailing", "linspace")

# Fields of a scheduler config that change the result and are not implemented, with their neutral
# values.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "thresholding": (False,),
    "trained_betas": (),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete",),
    "skip_prk_steps": (True,),
    "time_shift_type": ("exponential", "linear"),
    "use_lu_lambdas": (False,),
    # diffusers runs deis as dpmsolver++, and logrho as midpoint
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (),
    "scale_factors": (),
    "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
    "sigma_min": (),
    "sigma_max": (),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
}


# What numbers of a scheduler config may be: outside, arithmetic would fail or fill the memory.
_RANGES: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (1e-12, 0.999),
    "beta_end": (1e-12, 0.999),
    "steps_offset": (0, 100_000),
    "clip_sample_range": (1e-6, 1e6),
    "solver_order": (1, 3),
    "original_inference_steps": (1, 100_000),
    "timestep_scaling": (1e-6, 1e6),
    "shift": (1e-6, 1e6),
    "base_shift": (-20, 20),
    "max_shift": (-20, 20),
    "base_image_seq_len": (0, 1e9),
    "max_image_seq_len": (1, 1e9),
    "shift_terminal": (0, 0.999),
}
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


def _check(name: str, value: object, kind: str) -> None:
    """Check one field of a config.

    Raises:
        ArchitectureError: not of its kind, or out of range.
    """
    fits = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits:
        raise ArchitectureError(f"scheduler config field {name}={value!r} must be {kind}")
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        raise ArchitectureError(
            f"scheduler config field {name}={value!r} must lie between {low:g} and {high:g}"
        )


@dataclass(frozen=True, slots=True)
class SchedulerFacts:
    """What a checkpoint says about its schedule; the defaults are SD1.5's and Flux schnell's.

    Attributes:
        name: diffusers class the checkpoint names, "" if it names none.
        timestep_spacing, set_alpha_to_one, clip_sample: None where the config is silent.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: how noise levels are spread
            between the ends of the table; at most one.
        rescale_betas_zero_snr: whether the last timestep is noise and nothing else.
        final_sigmas_type: "zero", or "sigma_min": a run ends at the lowest level of the table.
        algorithm_type, solver_order, lower_order_final, euler_at_final: of DPM++ and UniPC.
        original_inference_steps, timestep_scaling: of LCM and TCD; None where the config is silent.
        shift: static flow shift, used unless `use_dynamic_shifting`; `flow_shift` is its name in
            configs of DPM++ and UniPC.
        base_image_seq_len, max_image_seq_len: tokens at which the dynamic shift is base_shift,
            max_shift.
        shift_rule: "linear" in the tokens between those two, or "flux2", fitted to tokens and
            steps.
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
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int | None = None
    timestep_scaling: float = 10.0
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"
    shift_rule: str = "linear"

    @property
    def spread(self) -> str:
        """Name of the schedule that the config's switches ask for, "" if none."""
        given = [name for name, on in self._spreads().items() if on]
        if len(given) > 1:
            raise ArchitectureError(
                f"scheduler config asks for several spreads of noise levels: {', '.join(given)}"
            )
        return given[0] if given else ""

    def _spreads(self) -> Mapping[str, bool]:
        return {
            "karras": self.use_karras_sigmas,
            "exponential": self.use_exponential_sigmas,
            "beta_sigmas": self.use_beta_sigmas,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SchedulerFacts:
        """Read a scheduler_config.json.

        Raises:
            ArchitectureError: a field asks for what is not implemented, or makes no sense.
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
        fields = {field.name: str(field.type).split(" ")[0] for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if key in fields and value is not None}
        if config.get("use_flow_sigmas") and config.get("flow_shift") is not None:
            given["shift"] = config["flow_shift"]
        for key, value in given.items():
            _check(key, value, fields[key])
        return cls(**{**silent, **given, "name": str(config.get("_class_name") or "")})


def alphas_cumprod(facts: SchedulerFacts) -> Tensor:
    """Cumulative product of 1 - beta over the training timesteps: (num_train_timesteps,) float32.

    With `rescale_betas_zero_snr` the last is 0 and the first stays (arXiv:2305.08891 algorithm 1).
    A torch tensor, and computed in float32 with all its rounding: other programs do the same, and
    chaotic runs make pictures out of a last bit.
    """
    if facts.rescale_betas_zero_snr:
        roots = _cumulative(facts).sqrt()
        scaled = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        alphas = scaled**2
        # by way of the betas, as other programs go, for the same rounding
        betas = 1 - torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
        return torch.cumprod(1.0 - betas, dim=0)
    return _cumulative(facts)


def sigma_table(facts: SchedulerFacts) -> NDArray[np.float32]:
    """Noise per clean signal at each training timestep, rising: (num_train_timesteps,) float32.

    With a terminal SNR of zero the last is 4096 instead of infinite, as in diffusers, so that a run
    can begin there.
    """
    alphas = alphas_cumprod(facts)
    if facts.rescale_betas_zero_snr:
        alphas[-1] = 2**-24
    table: NDArray[np.float32] = (((1 - alphas) / alphas) ** 0.5).numpy()
    return table


def _cumulative(facts: SchedulerFacts) -> Tensor:
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


def timesteps(
    facts: SchedulerFacts, steps: int, spacing: str, *, spare: bool = False
) -> NDArray[np.float32]:
    """Training timesteps a run of `steps` visits, noisiest first: (steps,) float32.

    Args:
        facts: the schedule; `steps_offset` applies to leading spacing only.
        steps: 1 to num_train_timesteps.
        spacing: one of SPACINGS; `linspace` gives fractions. An offset never leaves the table.
        spare: whether leading and linspace lay out one step more and leave out the cleanest, in
            whole timesteps: so do diffusers' DPM++ and UniPC.
    """
    count = facts.num_train_timesteps
    if not 1 <= steps <= count:
        raise UsageError(f"steps must be between 1 and {count}, found {steps}")
    match spacing:
        case "leading" if spare:
            picked = np.arange(1, steps + 1)[::-1] * float(count // (steps + 1))
            picked = picked + facts.steps_offset
        case "linspace" if spare:
            picked = np.round(np.linspace(0, count - 1, steps + 1))[:0:-1]
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


def flow_shift(facts: SchedulerFacts, tokens: int, steps: int = 0) -> float:
    """The factor by which a flow schedule leans towards noise, for a picture of `tokens` tokens.

    `steps` matters to the "flux2" rule alone.
    """
    if not facts.use_dynamic_shifting:
        return facts.shift
    match facts.shift_rule:
        case "linear":
            span = facts.max_image_seq_len - facts.base_image_seq_len
            if span <= 0:
                raise ArchitectureError(
                    "scheduler config: max_image_seq_len must be above base_image_seq_len, found "
                    f"{facts.max_image_seq_len} and {facts.base_image_seq_len}"
                )
            slope = (facts.max_shift - facts.base_shift) / span
            mu = facts.base_shift + slope * (tokens - facts.base_image_seq_len)
        case "flux2":
            mu = flux2_mu(tokens, steps)
        case other:
            raise ArchitectureError(f"shift rule {other!r} is not known (known: linear, flux2)")
    return math.exp(mu) if facts.time_shift_type == "exponential" else mu


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's logarithm of the shift: lines fitted at 10 and 200 steps, and between them a third.

    Above 4300 tokens the line of 200 steps holds for any count.
    Source: huggingface/diffusers 0.42 pipelines/flux2/pipeline_flux2.py (compute_empirical_mu).
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (steps - 200)


def bend(facts: SchedulerFacts, even: NDArray[np.floating[Any]], shift: float) -> NDArray[Any]:
    """Shift flow times: s t / (1 + (s - 1) t), in the order of operations that diffusers uses."""
    if facts.use_dynamic_shifting:
        with np.errstate(divide="ignore"):  # time 0 stays 0
            curved: NDArray[Any] = shift / (shift + (1 / even - 1))
        return curved
    straight: NDArray[Any] = shift * even / (1 + (shift - 1) * even)
    return straight
