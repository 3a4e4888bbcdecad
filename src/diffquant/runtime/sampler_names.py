"""Names of samplers and schedules, in everyone's spelling: one table, no torch.

ComfyUI, A1111 and Forge, and stable-diffusion.cpp spell the same things differently, and A1111
joins the two into one ("DPM++ 2M Karras"). Spellings are compared by letters, digits and plus signs
alone, so case, spaces, dashes and underscores do not matter.
Sources: comfyanonymous/ComfyUI comfy/samplers.py (KSAMPLER_NAMES, SCHEDULER_HANDLERS);
AUTOMATIC1111/stable-diffusion-webui modules/sd_samplers_kdiffusion.py, modules/sd_schedulers.py;
leejet/stable-diffusion.cpp@97d2990 (--sampling-method, --scheduler).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.core.errors import UnknownFormat

__all__ = ["SAMPLER_NAMES", "SCHEDULE_NAMES", "Name", "Named", "sampler_named", "schedule_named"]


@dataclass(frozen=True, slots=True)
class Name:
    """A name with its other spellings.

    Attributes:
        name: ours, as reports and commands write it.
        title: A1111's, as pictures carry it in their parameters.
        meaning: what it does, in a line.
        spellings: other names for the same thing.
    """

    name: str
    title: str
    meaning: str
    spellings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Named:
    """What a spelling means: a sampler, and a schedule where the spelling names one, else ""."""

    sampler: str
    schedule: str = ""


SAMPLER_NAMES: tuple[Name, ...] = (
    Name("euler", "Euler", "first order, the same noise gives the same picture", ("flow_euler",)),
    Name(
        "euler_a",
        "Euler a",
        "Euler with fresh noise at each step: never settles as steps grow",
        ("euler_ancestral", "flow_euler_a", "k_euler_a"),
    ),
    Name("heun", "Heun", "second order, two model calls a step", ("flow_heun",)),
    Name(
        "dpmpp_2m",
        "DPM++ 2M",
        "second order over two steps, one model call a step",
        ("dpm++2m", "flow_dpmpp_2m", "k_dpmpp_2m"),
    ),
    Name(
        "dpmpp_2m_sde",
        "DPM++ 2M SDE",
        "DPM++ 2M with fresh noise at each step",
        ("dpm++2m_sde", "dpmpp_2m_sde_gpu", "flow_dpmpp_2m_sde", "k_dpmpp_2m_sde"),
    ),
    Name(
        "dpmpp_sde",
        "DPM++ SDE",
        "second order with fresh noise, two model calls a step",
        ("dpm++sde", "dpmpp_sde_gpu", "k_dpmpp_sde"),
    ),
    Name("ddim", "DDIM", "the first fast one; first order over training timesteps", ()),
    Name("pndm", "PLMS", "four outputs blended; one model call more than steps", ("plms",)),
    Name(
        "unipc",
        "UniPC",
        "second order, corrects each step with the next call",
        ("uni_pc", "uni_pc_bh2", "flow_unipc"),
    ),
    Name("lcm", "LCM", "for models and LoRAs distilled for it, 2 to 8 steps", ("flow_lcm",)),
    Name("tcd", "TCD", "for models and LoRAs distilled for it; eta sets the fresh noise", ()),
)

SCHEDULE_NAMES: tuple[Name, ...] = (
    Name("leading", "Leading", "every k-th timestep, from below (diffusers' spacing)"),
    Name("trailing", "Trailing", "every k-th timestep, from the noisiest (diffusers' spacing)"),
    Name("linspace", "Linspace", "evenly between the ends of the table (diffusers' spacing)"),
    Name(
        "normal",
        "Normal",
        "evenly spaced timesteps, both ends included",
        ("discrete", "uniform"),
    ),
    Name("sgm_uniform", "SGM Uniform", "evenly spaced timesteps without the last, cleanest one"),
    Name("simple", "Simple", "every k-th noise level of the model's own table"),
    Name("ddim_uniform", "DDIM Uniform", "every k-th noise level, counted from the cleanest"),
    Name("karras", "Karras", "finer where there is little noise: even in the seventh root"),
    Name("exponential", "Exponential", "even in the logarithm of the noise level"),
    Name("beta", "Beta", "timesteps denser at both ends, by a beta distribution"),
    Name("beta_sigmas", "Beta sigmas", "noise levels by a beta distribution (diffusers' reading)"),
    Name(
        "ays",
        "Align Your Steps",
        "levels optimised for 10 steps of SD1 or SDXL",
        ("align_your_steps",),
    ),
    Name("lcm", "LCM", "a few of the 50 timesteps that LCM and TCD were distilled on"),
)


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", text.lower().replace("++", "pp"))


def _table(rows: Sequence[Name]) -> Mapping[str, str]:
    return {
        _key(spelling): row.name
        for row in rows
        for spelling in (row.name, row.title, *row.spellings)
    }


_SAMPLERS = _table(SAMPLER_NAMES)
_SCHEDULES = _table(SCHEDULE_NAMES)


def schedule_named(text: str) -> str:
    """Our name of a schedule.

    Raises:
        UnknownFormat: nobody's spelling.
    """
    if (name := _SCHEDULES.get(_key(text))) is None:
        raise UnknownFormat(text, [row.name for row in SCHEDULE_NAMES], what="schedule")
    return name


def sampler_named(text: str) -> Named:
    """Our name of a sampler, and of the schedule that stands behind it ("DPM++ 2M Karras").

    Raises:
        UnknownFormat: nobody's spelling; the message names the closest.
    """
    key = _key(text)
    if key in _SAMPLERS:
        return Named(_SAMPLERS[key])
    for schedule, name in _SCHEDULES.items():
        if key.endswith(schedule) and key.removesuffix(schedule) in _SAMPLERS:
            return Named(_SAMPLERS[key.removesuffix(schedule)], name)
    raise UnknownFormat(text, [row.name for row in SAMPLER_NAMES], what="sampler")
