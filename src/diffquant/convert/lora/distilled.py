"""LoRAs that make a model draw in few steps: known by name only, so a hint and no more.

The weights do not tell them from any other LoRA; the file's name, or the title in its header, may.
Steps, guidance and sampler are the makers', from their model pages as the advice names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DISTILLED", "Distilled", "distilled_of"]


@dataclass(frozen=True, slots=True)
class Distilled:
    """One recipe.

    Attributes:
        slug: name in reports.
        title: name for people.
        pattern: found in names, lower case, spaces and dashes made underscores.
        bases: architectures it exists for.
        advice: how its makers use it; cfg 1 runs the model once per step.
        source: the model page on huggingface.co.
    """

    slug: str
    title: str
    pattern: str
    bases: tuple[str, ...]
    advice: str
    source: str


_SD = ("sd15", "sd2", "sdxl")
# More particular names first.
DISTILLED = (
    Distilled(
        "hyper_flux",
        "Hyper-SD for Flux",
        r"hyper_?(sd_?)?flux",
        ("flux1",),
        "weight 0.125, 8 or 16 steps as named, cfg 1, guidance 3.5, Euler simple",
        "ByteDance/Hyper-SD",
    ),
    Distilled(
        "hyper_sd3",
        "Hyper-SD for SD3",
        r"hyper_?sd3",
        ("sd3",),
        "weight 0.125, 4, 8 or 16 steps as named, cfg 3 to 7, flow Euler",
        "ByteDance/Hyper-SD",
    ),
    Distilled(
        "hyper_sd",
        "Hyper-SD",
        r"hyper_?(sd|sdxl)",
        _SD,
        "weight 1, steps as named, cfg 1, DDIM trailing (one step: TCD, eta 1)",
        "ByteDance/Hyper-SD",
    ),
    Distilled(
        "qwen_lightning",
        "Qwen-Image-Lightning",
        r"qwen.*lightning",
        ("qwen_image",),
        "weight 1, 4 or 8 steps as named, cfg 1, Euler, exponential shift ln 3",
        "lightx2v/Qwen-Image-Lightning",
    ),
    Distilled(
        "wan_lightning",
        "Wan step distillation (lightx2v, CausVid)",
        r"(wan.*(lightx2v|lightning|causvid))|lightx2v.*wan",
        ("wan",),
        "4 to 8 steps, cfg 1",
        "lightx2v",
    ),
    Distilled(
        "sdxl_lightning",
        "SDXL-Lightning",
        r"(sdxl.*lightning)|lightning",
        ("sdxl",),
        "weight 1, exactly the named steps, cfg 1, Euler trailing (sgm_uniform)",
        "ByteDance/SDXL-Lightning",
    ),
    Distilled(
        "lcm",
        "LCM-LoRA",
        r"(^|_)lcm(_|$)|lcm_?lora",
        _SD,
        "weight 1, 4 to 8 steps, cfg 1 to 2, LCM sampler",
        "latent-consistency/lcm-lora-sdv1-5",
    ),
    Distilled(
        "tcd",
        "TCD-LoRA",
        r"(^|_)tcd(_|$)",
        _SD,
        "weight 1, 4 steps and more, cfg 1, TCD sampler, eta 0.3",
        "h1t/TCD-SDXL-LoRA",
    ),
    Distilled(
        "dmd2",
        "DMD2",
        r"dmd_?2",
        ("sdxl",),
        "weight 1, 4 steps at timesteps 999, 749, 499, 249, cfg 1, LCM sampler",
        "tianweiy/DMD2",
    ),
    Distilled(
        "pcm",
        "PCM",
        r"(^|_)pcm(_|$)",
        ("sd15", "sdxl", "sd3"),
        "weight 1, steps as named, cfg by name (normal 2.5 to 6, small 1 to 2), DDIM trailing",
        "wangfuyun/PCM_Weights",
    ),
    Distilled(
        "turbo_alpha",
        "FLUX.1-Turbo-Alpha",
        r"turbo_?alpha|flux.*turbo",
        ("flux1",),
        "weight 1, 8 steps, cfg 1, guidance 3.5, Euler simple",
        "alimama-creative/FLUX.1-Turbo-Alpha",
    ),
    Distilled(
        "flux2_turbo",
        "FLUX.2-dev-Turbo",
        r"flux_?2.*turbo",
        ("flux2",),
        "weight 1, 8 steps of their own, guidance 2.5",
        "fal/FLUX.2-dev-Turbo",
    ),
    Distilled(
        "sdxl_flash",
        "SDXL-Flash",
        r"sdxl_?flash",
        ("sdxl",),
        "weight 0.55, 6 to 9 steps, cfg 2.5 to 3.5, DPM++ SDE",
        "sd-community/sdxl-flash",
    ),
)


def distilled_of(names: Iterable[str], architecture: str) -> Distilled | None:
    """The recipe that a file's name or title tells, if there is one for the architecture."""
    told = [re.sub(r"[\s.\-]+", "_", name[:200].lower()) for name in names]
    for row in DISTILLED:
        if architecture in row.bases and any(re.search(row.pattern, name) for name in told):
            return row
    return None
