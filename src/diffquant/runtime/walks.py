"""Which noise levels a run visits: named schedules laid out over a training schedule.

Two families of schedules share names, and a row says which it means. `leading`, `trailing`,
`linspace`, `karras`, `exponential` and `beta_sigmas` are diffusers' and follow its classes to the
last rounding. `normal`, `sgm_uniform`, `simple`, `ddim_uniform` and `beta` are ComfyUI's.
Sources: huggingface/diffusers 0.42 schedulers/; comfyanonymous/ComfyUI comfy/samplers.py
(simple_scheduler, normal_scheduler, ddim_scheduler, beta_scheduler) and comfy/model_sampling.py;
AYS arXiv:2404.14507, its levels as NVIDIA published them (diffusers
schedulers/scheduling_utils.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.levels import Levels, Walk
from diffquant.runtime.sampler_names import schedule_named
from diffquant.runtime.schedules import SPACINGS, SchedulerFacts, bend, flow_shift, sigma_table
from diffquant.runtime.schedules import timesteps as spaced

__all__ = ["diffusion_walk", "flow_walk"]

_Array: TypeAlias = NDArray[np.float64]


def _quantile(share: _Array) -> _Array:
    """Quantiles of the beta distribution with both parameters 0.6 (arXiv:2407.12173)."""
    from scipy.special import betaincinv

    found: _Array = betaincinv(0.6, 0.6, share)
    return found


def _karras(first: float, last: float, steps: int) -> _Array:
    """Even in the seventh root (arXiv:2206.00364 equation 5, rho = 7)."""
    ramp = np.linspace(0, 1, steps)
    top, bottom = first ** (1 / 7), last ** (1 / 7)
    return np.asarray((top + ramp * (bottom - top)) ** 7)


def _exponential(first: float, last: float, steps: int) -> _Array:
    return np.exp(np.linspace(np.log(first), np.log(last), steps))


def _beta_sigmas(first: float, last: float, steps: int) -> _Array:
    return last + _quantile(1 - np.linspace(0, 1, steps)) * (first - last)


_SPREADS: Mapping[str, Callable[[float, float, int], _Array]] = {
    "karras": _karras,
    "exponential": _exponential,
    "beta_sigmas": _beta_sigmas,
}

_AYS: Mapping[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
}
_AYS_END = 0.029  # the lowest level of the table, where interpolation for other step counts ends


def _normal(steps: int, count: int) -> _Array:
    return np.linspace(count - 1, 0, steps)


def _sgm_uniform(steps: int, count: int) -> _Array:
    return np.linspace(count - 1, 0, steps + 1)[:-1]


def _simple(steps: int, count: int) -> _Array:
    return np.array([count - 1 - int(index * count / steps) for index in range(steps)], float)


def _ddim_uniform(steps: int, count: int) -> _Array:
    """One step more than asked for wherever `steps` does not divide the table: ComfyUI's count."""
    return np.arange(1, count, max(count // steps, 1))[::-1].astype(float)


def _beta(steps: int, count: int) -> _Array:
    picked = np.rint(_quantile(1 - np.linspace(0, 1, steps, endpoint=False)) * (count - 1))
    if len(np.unique(picked)) < steps:
        raise UsageError(f"{steps} steps are too many for the beta schedule: two would coincide")
    return picked


# ComfyUI's: (steps, levels in the table) -> positions in the table, noisiest first.
_POSITIONS: Mapping[str, Callable[[int, int], _Array]] = {
    "normal": _normal,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
}


def _ays(steps: int, architecture: str) -> _Array:
    if architecture not in _AYS:
        raise UsageError(
            f"schedule 'ays' has levels for {', '.join(_AYS)}, not for "
            f"{architecture or 'this model'}"
        )
    levels = np.array(_AYS[architecture])
    if steps == len(levels):
        return levels
    ends = np.append(levels, _AYS_END)
    places = np.linspace(0, 1, steps + 1)
    filled = np.interp(places, np.linspace(0, 1, len(ends)), np.log(ends))
    return np.asarray(np.exp(filled)[:-1])


def _lcm(facts: SchedulerFacts, steps: int) -> _Array:
    """A few of the timesteps that the teacher was distilled on (arXiv:2310.04378 section 4.3)."""
    original = facts.original_inference_steps or 50
    if not 1 <= steps <= original <= facts.num_train_timesteps:
        raise UsageError(
            f"steps must be between 1 and {original}, the steps it was distilled on, found {steps}"
        )
    taught = np.arange(original, 0, -1) * (facts.num_train_timesteps // original) - 1
    picked = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return np.asarray(taught[picked], float)


@dataclass(frozen=True, slots=True)
class _Table:
    """The noise levels of a model, rising, and the one that a run ends at."""

    sigmas: NDArray[np.float32]
    last: float

    def at(self, places: NDArray[Any]) -> NDArray[Any]:
        """Levels between timesteps as diffusers has them: even in sigma."""
        return np.asarray(np.interp(places, np.arange(len(self.sigmas)), self.sigmas))

    def at_even_logs(self, places: NDArray[Any]) -> NDArray[Any]:
        """Levels between timesteps as ComfyUI has them: even in the logarithm."""
        logs = np.interp(places, np.arange(len(self.sigmas)), np.log(self.sigmas))
        return np.asarray(np.exp(logs))

    def timesteps(self, levels: NDArray[Any]) -> NDArray[Any]:
        """Where levels lie, even in the logarithm in every program."""
        places = np.interp(np.log(levels), np.log(self.sigmas), np.arange(len(self.sigmas)))
        return np.asarray(places)


def _table_of(facts: SchedulerFacts) -> _Table:
    sigmas = sigma_table(facts)
    return _Table(sigmas, float(sigmas[0]) if facts.final_sigmas_type == "sigma_min" else 0.0)


def _finish(
    timesteps: NDArray[Any], sigmas: NDArray[Any], last: float, *, unit: bool, even: bool = False
) -> Walk:
    told = tuple(float(t) for t in np.append(timesteps, 0.0).astype(np.float32))
    levels = tuple(float(s) for s in np.append(sigmas, last).astype(np.float32))
    return Walk(told, levels, len(told) - 1, unit=unit, even=even)


def diffusion_walk(
    facts: SchedulerFacts,
    steps: int,
    schedule: str | Levels | None,
    *,
    spacing: str = "linspace",
    spare: bool = False,
    architecture: str = "",
) -> Walk:
    """Lay out the levels of a diffusion model's run.

    Args:
        facts: the training schedule, and what the config asks for where `schedule` is None.
        steps: 1 to num_train_timesteps.
        schedule: key of SCHEDULE_NAMES in any spelling, levels one by one, or None.
        spacing: what a silent config means to the sampler's class.
        spare: as diffusers' DPM++ and UniPC lay out, see `timesteps`; whole timesteps then.
        architecture: slug, for schedules made for one model.

    Raises:
        UnknownFormat: no such schedule.
        UsageError: it does not fit the model or the steps.
    """
    if not 1 <= steps <= facts.num_train_timesteps:
        raise UsageError(f"steps must be between 1 and {facts.num_train_timesteps}, found {steps}")
    table = _table_of(facts)
    if isinstance(schedule, Levels):
        return _given(schedule, table)
    name = schedule_named(schedule) if schedule else facts.spread
    if name in _POSITIONS:
        told = _POSITIONS[name](steps, len(table.sigmas))
        return _finish(told, table.at_even_logs(told), table.last, unit=True)
    if name == "ays":
        levels = _ays(steps, architecture)
        return _finish(table.timesteps(levels), levels, table.last, unit=True)
    if name == "lcm":
        told = _lcm(facts, steps)
        return _finish(told, table.at(told), table.last, unit=False)
    default = "linspace" if schedule else facts.timestep_spacing or spacing
    chosen = name if name in SPACINGS else default
    told = np.asarray(spaced(facts, steps, chosen, spare=spare), float)
    levels, unit = table.at(told), chosen == "leading"
    if name not in _SPREADS:
        return _finish(told, levels, table.last, unit=unit, even=True)
    # diffusers' DPM++ and UniPC spread over the whole table, its others over what spacing visits
    first, final = (table.sigmas[-1], table.sigmas[0]) if spare else (levels[0], levels[-1])
    levels = _SPREADS[name](float(first), float(final), steps)
    told = table.timesteps(levels)
    if spare:  # the model sees whole timesteps there, by rounding or else by cutting off
        told = np.round(told) if name == "karras" else np.floor(told)
    return _finish(told, levels, table.last, unit=unit)


def _given(given: Levels, table: _Table) -> Walk:
    """Levels one by one, within a hundredth of the table's ends."""
    top, low = float(table.sigmas[-1]), float(table.sigmas[0])
    if given.timesteps:
        told = np.array(given.timesteps)
        if told[0] > len(table.sigmas) - 1:
            raise UsageError(
                f"timestep {told[0]:g} is outside the table, which ends at {len(table.sigmas) - 1}"
            )
        return _finish(told, table.at(told), table.last, unit=False)
    levels = np.array(given.sigmas)
    if levels[0] > top * 1.01 or levels[-1] < low * 0.99:
        raise UsageError(
            f"sigmas from {levels[0]:g} to {levels[-1]:g} are outside the table, which goes from "
            f"{top:g} to {low:g}"
        )
    return _finish(table.timesteps(levels), levels, table.last, unit=True)


def _to_share(steps: int, low: float) -> _Array:
    return np.linspace(1.0, 1.0 / steps, steps)


def _to_low(steps: int, low: float) -> _Array:
    return np.linspace(1.0, low, steps)


def _before_low(steps: int, low: float) -> _Array:
    return np.linspace(1.0, low, steps + 1)[:-1]


# (steps, lowest time of the shifted table) -> even times, which the shift bends (again: ComfyUI and
# diffusers both measure the lowest one after shifting)
_EVEN: Mapping[str, Callable[[int, float], _Array]] = {
    **dict.fromkeys(("", "trailing", *_SPREADS), _to_share),
    **dict.fromkeys(("normal", "linspace"), _to_low),
    "sgm_uniform": _before_low,
}


def _flow_table(facts: SchedulerFacts, shift: float) -> _Array:
    """The shifted flow times of every training timestep, rising."""
    count = facts.num_train_timesteps
    return np.asarray(bend(facts, np.arange(1, count + 1) / count, shift))


def flow_walk(
    facts: SchedulerFacts, steps: int, schedule: str | Levels | None, *, tokens: int
) -> Walk:
    """Lay out the flow times of a run, from noise to picture.

    Times are even from 1 to 1 / steps unless a schedule says otherwise, then bent towards noise
    (`flow_shift`), then stretched so that the last is `shift_terminal`, if there is one.

    Raises:
        UnknownFormat: no such schedule.
        UsageError: it is made for diffusion models.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, found {steps}")
    if isinstance(schedule, Levels):
        if schedule.timesteps:
            raise UsageError("a flow has no training timesteps to list: give sigmas")
        if schedule.sigmas[0] > 1:
            raise UsageError(f"flow times lie between 0 and 1, found {schedule.sigmas[0]:g}")
        steps = len(schedule.sigmas)
    shift = flow_shift(facts, tokens, steps)
    name = "" if isinstance(schedule, Levels) or not schedule else schedule_named(schedule)
    spread = name or ("" if isinstance(schedule, Levels) else facts.spread)
    sigmas = _flow_sigmas(facts, steps, schedule, name, shift)
    if spread in _SPREADS:
        sigmas = _SPREADS[spread](float(sigmas[0]), float(sigmas[-1]), steps)
    told = sigmas.astype(np.float32) * np.float32(facts.num_train_timesteps)
    return dataclasses.replace(_finish(told, sigmas, 0.0, unit=False), flow=True)


def _flow_sigmas(
    facts: SchedulerFacts, steps: int, schedule: str | Levels | None, name: str, shift: float
) -> NDArray[Any]:
    if isinstance(schedule, Levels):
        given = np.array(schedule.sigmas, np.float32)
        return bend(facts, given, shift) if schedule.bent else given
    table = _flow_table(facts, shift)
    if name in ("simple", "beta", "ddim_uniform"):
        return np.asarray(table[_POSITIONS[name](steps, len(table)).astype(int)])
    if name not in _EVEN:
        known = sorted({*_EVEN, *_POSITIONS} - {""})
        raise UnknownFormat(name, known, what="schedule for flows")
    sigmas = bend(facts, _EVEN[name](steps, float(table[0])).astype(np.float32), shift)
    if facts.shift_terminal and steps > 1:  # a single step begins at 1, it cannot end elsewhere
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - facts.shift_terminal))
    return sigmas
