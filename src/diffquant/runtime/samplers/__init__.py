"""Samplers: from noise to latents, one model call per timestep.

One family of samplers a file; base.py has the loop they all run in. Names are looked up in
sampler_names.py, noise levels laid out in walks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffquant.core.errors import UsageError
from diffquant.runtime.levels import WHOLE, Levels, Part
from diffquant.runtime.sampler_names import sampler_named
from diffquant.runtime.samplers.base import Draw, Request, Sampler
from diffquant.runtime.samplers.consistency import Lcm, Tcd
from diffquant.runtime.samplers.ddim import Ddim
from diffquant.runtime.samplers.dpm import dpmpp_2m, dpmpp_2m_sde
from diffquant.runtime.samplers.dpm_sde import DpmSde
from diffquant.runtime.samplers.euler import Euler, EulerAncestral, Heun
from diffquant.runtime.samplers.flow import (
    FlowEuler,
    FlowEulerAncestral,
    FlowHeun,
    FlowLcm,
    flow_dpmpp_2m,
    flow_dpmpp_2m_sde,
    flow_unipc,
)
from diffquant.runtime.samplers.pndm import Pndm
from diffquant.runtime.samplers.unipc import unipc
from diffquant.runtime.schedules import SchedulerFacts

__all__ = [
    "SAMPLERS",
    "Draw",
    "Levels",
    "Part",
    "Request",
    "Sampler",
    "SamplerRow",
    "default_sampler",
    "make_sampler",
]


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """A sampler by name.

    Attributes:
        make: Request -> Sampler.
        flow: whether it integrates a flow (Flux) rather than a diffusion (SD).
        classes: diffusers scheduler classes it stands for.
        draws: whether it adds noise of its own, so that a run needs `draw`.
        eta: whether the caller may choose how much.
    """

    make: Callable[[Request], Sampler]
    flow: bool
    classes: tuple[str, ...]
    draws: bool = False
    eta: bool = False


SAMPLERS: Mapping[str, SamplerRow] = {
    "ddim": SamplerRow(Ddim, flow=False, classes=("DDIMScheduler",), eta=True),
    "euler": SamplerRow(Euler, flow=False, classes=("EulerDiscreteScheduler",)),
    "euler_a": SamplerRow(
        EulerAncestral, flow=False, classes=("EulerAncestralDiscreteScheduler",), draws=True
    ),
    "heun": SamplerRow(Heun, flow=False, classes=("HeunDiscreteScheduler",)),
    "dpmpp_2m": SamplerRow(
        dpmpp_2m,
        flow=False,
        classes=("DPMSolverMultistepScheduler", "DEISMultistepScheduler"),
    ),
    "dpmpp_2m_sde": SamplerRow(dpmpp_2m_sde, flow=False, classes=(), draws=True),
    "dpmpp_sde": SamplerRow(DpmSde, flow=False, classes=("DPMSolverSDEScheduler",), draws=True),
    "pndm": SamplerRow(Pndm, flow=False, classes=("PNDMScheduler",)),
    "unipc": SamplerRow(unipc, flow=False, classes=("UniPCMultistepScheduler",)),
    "lcm": SamplerRow(Lcm, flow=False, classes=("LCMScheduler",), draws=True),
    "tcd": SamplerRow(Tcd, flow=False, classes=("TCDScheduler",), draws=True, eta=True),
    "flow_euler": SamplerRow(FlowEuler, flow=True, classes=("FlowMatchEulerDiscreteScheduler",)),
    "flow_euler_a": SamplerRow(
        FlowEulerAncestral,
        flow=True,
        classes=("LTXEulerAncestralRFScheduler",),
        draws=True,
        eta=True,
    ),
    "flow_heun": SamplerRow(FlowHeun, flow=True, classes=("FlowMatchHeunDiscreteScheduler",)),
    "flow_dpmpp_2m": SamplerRow(flow_dpmpp_2m, flow=True, classes=("DPMSolverMultistepScheduler",)),
    "flow_dpmpp_2m_sde": SamplerRow(flow_dpmpp_2m_sde, flow=True, classes=(), draws=True),
    "flow_lcm": SamplerRow(FlowLcm, flow=True, classes=("FlowMatchLCMScheduler",), draws=True),
    "flow_unipc": SamplerRow(flow_unipc, flow=True, classes=("UniPCMultistepScheduler",)),
}


def default_sampler(facts: SchedulerFacts, *, flow: bool) -> str:
    """Name of the sampler a checkpoint asks for; one that names no scheduler gets Euler.

    Raises:
        UsageError: the checkpoint names a scheduler that has no row; the message lists what there
            is.
    """
    if not facts.name:
        return "flow_euler" if flow else "euler"
    for name, row in SAMPLERS.items():
        if facts.name in row.classes and row.flow == flow:
            sde = facts.algorithm_type.startswith("sde") and f"{name}_sde" in SAMPLERS
            return f"{name}_sde" if sde else name
    known = ", ".join(name for name, row in SAMPLERS.items() if row.flow == flow)
    raise UsageError(
        f"the checkpoint's scheduler {facts.name} is not implemented, name a sampler: {known}"
    )


def make_sampler(
    name: str,
    facts: SchedulerFacts,
    *,
    steps: int,
    tokens: int,
    flow: bool = False,
    schedule: str | Levels | None = None,
    shift: float | None = None,
    part: Part = WHOLE,
    draw: Draw | None = None,
    eta: float | None = None,
    architecture: str = "",
) -> Sampler:
    """Plan a run.

    Args:
        name: of a sampler in anyone's spelling; "euler" means "flow_euler" for flow models, and
            "DPM++ 2M Karras" names a schedule too.
        facts: what the checkpoint says about its schedule.
        steps: steps of the whole run; levels given one by one count themselves.
        tokens: of the picture, for shifts that depend on it.
        flow: whether the model predicts a flow's velocity.
        schedule: name in anyone's spelling, or levels; default: what `name` or the checkpoint says.
        shift: of flows, instead of all the checkpoint says about bending its times.
        part: the stretch of the run that is walked.
        draw: shape -> standard normal noise, for samplers that add some.
        eta: share of fresh noise from 0 to 1, for ddim (default 0), tcd (0.3) and flow_euler_a
            (1).
        architecture: slug, for schedules made for one model ("ays").

    Raises:
        UnknownFormat: no such sampler or schedule.
        UsageError: they do not fit the kind of model, the steps or each other.
    """
    named = sampler_named(name)
    chosen = f"flow_{named.sampler}" if flow else named.sampler
    own = "flow_" if name.startswith("flow_") and not flow else ""
    if (row := SAMPLERS.get(own + chosen)) is None or row.flow != flow:
        known = ", ".join(key for key, one in SAMPLERS.items() if one.flow == flow)
        raise UsageError(f"sampler {name!r} does not fit this model (fitting: {known})")
    if schedule is None and named.schedule:
        schedule = named.schedule
    if shift is not None:
        facts = _shifted(facts, shift, flow=flow)
    if isinstance(schedule, Levels):
        steps = len(schedule.timesteps or schedule.sigmas)
    if eta is not None and not row.eta:
        able = ", ".join(key for key, one in SAMPLERS.items() if one.eta)
        raise UsageError(f"sampler {name!r} takes no eta (taking one: {able})")
    if draw is None and (row.draws or (eta or 0) > 0):
        raise UsageError(f"sampler {name!r} adds noise of its own: give `draw`, or another sampler")
    return row.make(Request(facts, steps, tokens, schedule, part, draw, eta, architecture))


def _shifted(facts: SchedulerFacts, shift: float, *, flow: bool) -> SchedulerFacts:
    if not flow:
        raise UsageError("a shift belongs to flow models; this one has a table of noise levels")
    if not 0 < shift < float("inf"):
        raise UsageError(f"shift must be above 0, found {shift:g}")
    return dataclasses.replace(facts, shift=shift, use_dynamic_shifting=False, shift_terminal=None)
