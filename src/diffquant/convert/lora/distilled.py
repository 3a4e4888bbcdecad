"""Models and LoRAs that draw in few steps: known by name only, so a hint and no more.

The weights do not tell them from any other of their kind; the file's name, or the title in its
header, may. One table for both: most makers publish a LoRA and the same merged into a model.
Steps, guidance and sampler are the makers', from their model pages; `advice` is said to people,
`recipe` and `cases` are the same as data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DISTILLED", "Distilled", "Recipe", "distilled_of", "recipe_of", "steps_told"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a distilled model is run.

    Attributes:
        steps: where the name does not tell.
        fewest, most: steps it still works with; where a name tells and `exact`, only those.
        exact: whether the number in a name binds.
        cfg: strength of classifier-free guidance, 1 for none.
        cfg_most: above it pictures burn.
        guidance: value of a distilled guidance input, None where there is none.
        sampler, schedule: by our names, "" for the model's own.
        weight: of a LoRA.
        eta: fresh noise, where the sampler lets one choose.
        shift: of a flow, instead of the checkpoint's.
        timesteps, sigmas: levels one by one; `bent`: whether a flow's own shift applies to them.
        prediction: prediction type, where it is not the checkpoint's.
        few: whether it was distilled to few steps at all; a base beside such models was not.
    """

    steps: int
    fewest: int
    most: int
    exact: bool = False
    cfg: float = 1.0
    cfg_most: float = 2.0
    guidance: float | None = None
    sampler: str = "euler"
    schedule: str = ""
    weight: float = 1.0
    eta: float | None = None
    shift: float | None = None
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    bent: bool = False
    prediction: str = ""
    few: bool = True


@dataclass(frozen=True, slots=True)
class Distilled:
    """One row.

    Attributes:
        slug: name in reports.
        title: name for people.
        pattern: found in names, lower case, spaces, dots and dashes made underscores.
        bases: architectures it exists for.
        advice: how its makers use it; cfg 1 runs the model once per step.
        source: the model page, on huggingface.co where no other site is named.
        recipe: the same as data.
        cases: (pattern, recipe) of members that differ, by their names; the first found counts.
        lora: whether it exists as a LoRA; else it is a model, and no LoRA's name means it.
    """

    slug: str
    title: str
    pattern: str
    bases: tuple[str, ...]
    advice: str
    source: str
    recipe: Recipe
    cases: tuple[tuple[str, Recipe], ...] = ()
    lora: bool = True


_SD = ("sd15", "sd2", "sdxl")
_FLUX2_TURBO = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
# More particular names first.
DISTILLED = (
    Distilled(
        "hyper_flux",
        "Hyper-SD for Flux",
        r"hyper_?(sd_?)?flux",
        ("flux1",),
        "weight 0.125, 8 or 16 steps as named, cfg 1, guidance 3.5, Euler simple",
        "ByteDance/Hyper-SD",
        Recipe(8, 8, 16, exact=True, guidance=3.5, schedule="simple", weight=0.125),
    ),
    Distilled(
        "hyper_sd3",
        "Hyper-SD for SD3",
        r"hyper_?sd3",
        ("sd3",),
        "weight 0.125, 4, 8 or 16 steps as named, cfg 3 to 7, flow Euler",
        "ByteDance/Hyper-SD",
        Recipe(8, 4, 16, cfg=5.0, cfg_most=8.0, weight=0.125),
        cases=(
            (r"4_?step", Recipe(4, 4, 6, cfg=3.0, cfg_most=5.0, weight=0.125)),
            (r"16_?step", Recipe(16, 12, 16, cfg=7.0, cfg_most=8.0, weight=0.125)),
        ),
    ),
    Distilled(
        "hyper_sd",
        "Hyper-SD",
        r"hyper_?(sd|sdxl)",
        _SD,
        "weight 1, steps as named, cfg 1, DDIM trailing (one step: TCD, eta 1)",
        "ByteDance/Hyper-SD",
        Recipe(4, 2, 8, exact=True, sampler="ddim", schedule="trailing"),
        cases=(
            (
                r"(^|_)cfg(_|$)",
                Recipe(
                    8,
                    8,
                    12,
                    exact=True,
                    cfg=5.0,
                    cfg_most=8.0,
                    sampler="ddim",
                    schedule="trailing",
                ),
            ),
            (
                r"1_?step.*unet|unet.*1_?step",
                Recipe(1, 1, 1, sampler="lcm", timesteps=(800.0,)),
            ),
            (r"(^|_)1_?step", Recipe(1, 1, 8, sampler="tcd", eta=1.0)),
        ),
    ),
    Distilled(
        "qwen_lightning",
        "Qwen-Image-Lightning",
        r"qwen.*lightning",
        ("qwen_image",),
        "weight 1, 4 or 8 steps as named, cfg 1, Euler, exponential shift ln 3",
        "lightx2v/Qwen-Image-Lightning",
        Recipe(8, 4, 8, exact=True, shift=3.0),
    ),
    Distilled(
        "wan_lightning",
        "Wan step distillation (lightx2v, CausVid)",
        r"(wan.*(lightx2v|lightning|causvid))|lightx2v.*wan",
        ("wan",),
        "4 to 8 steps, cfg 1",
        "lightx2v",
        Recipe(4, 4, 8),
    ),
    Distilled(
        "sdxl_lightning",
        "SDXL-Lightning",
        r"(sdxl.*lightning)|lightning",
        ("sdxl",),
        "weight 1, exactly the named steps, cfg 1, Euler trailing (sgm_uniform)",
        "ByteDance/SDXL-Lightning",
        Recipe(4, 2, 8, exact=True, schedule="trailing"),
        cases=(
            (
                r"1_?step",
                Recipe(1, 1, 1, schedule="trailing", prediction="sample"),
            ),
        ),
    ),
    Distilled(
        "lcm",
        "LCM-LoRA",
        r"(^|_)lcm(_|$)|lcm_?lora",
        _SD,
        "weight 1, 4 to 8 steps, cfg 1 to 2, LCM sampler",
        "latent-consistency/lcm-lora-sdv1-5",
        Recipe(4, 2, 8, sampler="lcm"),
    ),
    Distilled(
        "tcd",
        "TCD-LoRA",
        r"(^|_)tcd(_|$)",
        _SD,
        "weight 1, 4 steps and more, cfg 1, TCD sampler, eta 0.3",
        "h1t/TCD-SDXL-LoRA",
        Recipe(4, 2, 50, sampler="tcd", eta=0.3),
    ),
    Distilled(
        "dmd2",
        "DMD2",
        r"dmd_?2",
        ("sdxl",),
        "weight 1, 4 steps at timesteps 999, 749, 499, 249, cfg 1, LCM sampler",
        "tianweiy/DMD2",
        Recipe(4, 4, 4, sampler="lcm", timesteps=(999.0, 749.0, 499.0, 249.0)),
        cases=((r"1_?step", Recipe(1, 1, 1, sampler="lcm", timesteps=(399.0,))),),
    ),
    Distilled(
        "pcm",
        "PCM",
        r"(^|_)pcm(_|$)",
        ("sd15", "sdxl", "sd3"),
        "weight 1, steps as named, cfg by name (normal 2.5 to 6, small 1 to 2), DDIM trailing",
        "wangfuyun/PCM_Weights",
        Recipe(4, 2, 16, exact=True, cfg=1.5, cfg_most=6.0, sampler="ddim", schedule="trailing"),
        cases=(
            (
                r"normal_?cfg",
                Recipe(
                    4, 2, 16, exact=True, cfg=3.0, cfg_most=6.0, sampler="ddim", schedule="trailing"
                ),
            ),
            (r"shift_?3|(^|_)sd3", Recipe(4, 2, 16, exact=True, cfg=1.2, shift=3.0)),
        ),
    ),
    Distilled(
        "turbo_alpha",
        "FLUX.1-Turbo-Alpha",
        r"turbo_?alpha|flux.*turbo",
        ("flux1",),
        "weight 1, 8 steps, cfg 1, guidance 3.5, Euler simple",
        "alimama-creative/FLUX.1-Turbo-Alpha",
        Recipe(8, 8, 8, guidance=3.5, schedule="simple"),
    ),
    Distilled(
        "flux2_turbo",
        "FLUX.2-dev-Turbo",
        r"flux_?2.*turbo",
        ("flux2",),
        "weight 1, 8 steps of their own, guidance 2.5",
        "fal/FLUX.2-dev-Turbo",
        Recipe(8, 8, 8, guidance=2.5, sigmas=_FLUX2_TURBO, bent=True),
    ),
    Distilled(
        "sdxl_flash",
        "SDXL-Flash",
        r"sdxl_?flash",
        ("sdxl",),
        "weight 0.55, 6 to 9 steps, cfg 2.5 to 3.5, DPM++ SDE",
        "sd-community/sdxl-flash",
        Recipe(7, 6, 9, cfg=3.0, cfg_most=3.5, sampler="dpmpp_sde", weight=0.55),
    ),
    Distilled(
        "sdxl_turbo",
        "SDXL-Turbo",
        r"sdxl_?turbo|sd_?xl_?turbo",
        ("sdxl",),
        "1 to 4 steps, cfg 1, Euler a trailing, 512 x 512",
        "stabilityai/sdxl-turbo",
        Recipe(1, 1, 4, sampler="euler_a", schedule="trailing"),
        lora=False,
    ),
    Distilled(
        "sd_turbo",
        "SD-Turbo",
        r"(^|_)sd_?turbo",
        ("sd2",),
        "1 to 4 steps, cfg 1, Euler a trailing, 512 x 512",
        "stabilityai/sd-turbo",
        Recipe(1, 1, 4, sampler="euler_a", schedule="trailing"),
        lora=False,
    ),
    Distilled(
        "sdxl_turbo_merge",
        "a merge of SDXL with its Turbo",
        r"turbo",
        ("sdxl",),
        "4 to 8 steps, cfg 2, DPM++ SDE Karras",
        "civitai.com/models/112902",
        Recipe(6, 4, 8, cfg=2.0, cfg_most=3.0, sampler="dpmpp_sde", schedule="karras"),
        lora=False,
    ),
    Distilled(
        "sd35_turbo",
        "SD3.5-Large-Turbo",
        r"turbo",
        ("sd3",),
        "4 steps, cfg 1, flow Euler, shift 3",
        "stabilityai/stable-diffusion-3.5-large-turbo",
        Recipe(4, 4, 8, shift=3.0),
        lora=False,
    ),
    Distilled(
        "flux_schnell",
        "FLUX.1-schnell",
        r"schnell",
        ("flux1",),
        "1 to 4 steps, cfg 1, Euler simple, shift 1",
        "black-forest-labs/FLUX.1-schnell",
        Recipe(4, 1, 4, schedule="simple"),
        lora=False,
    ),
    Distilled(
        "flux2_klein",
        "FLUX.2-klein",
        r"klein",
        ("flux2",),
        "4 steps, cfg 1, Euler",
        "black-forest-labs/FLUX.2-klein-4B",
        Recipe(4, 4, 8),
        cases=(
            (r"klein.*base|base.*klein", Recipe(50, 20, 100, cfg=4.0, cfg_most=20.0, few=False)),
        ),
        lora=False,
    ),
    Distilled(
        "z_image_turbo",
        "Z-Image-Turbo",
        r"z_?image.*turbo",
        ("z_image",),
        "9 steps, cfg 1, Euler, shift 3",
        "Tongyi-MAI/Z-Image-Turbo",
        Recipe(9, 8, 9, shift=3.0),
        lora=False,
    ),
    Distilled(
        "krea2_turbo",
        "Krea-2-Turbo",
        r"krea_?2.*turbo",
        ("krea2",),
        "8 steps, cfg 1, Euler, shift e**1.15",
        "baseten documentation of Krea-2-Turbo",
        Recipe(8, 8, 8, cfg_most=1.5, shift=3.158),
        lora=False,
    ),
    Distilled(
        "lcm_full",
        "a latent consistency model",
        r"(?!)",  # told by its weights, not by a name
        ("sd15", "sdxl"),
        "4 steps, guidance 8 through its own input, cfg 1, LCM sampler",
        "SimianLuo/LCM_Dreamshaper_v7",
        Recipe(4, 1, 8, cfg_most=1.0, guidance=8.0, sampler="lcm"),
        lora=False,
    ),
)


def _folded(names: Iterable[str]) -> list[str]:
    return [re.sub(r"[\s.\-]+", "_", name[:200].lower()) for name in names]


def distilled_of(names: Iterable[str], architecture: str, *, lora: bool = True) -> Distilled | None:
    """The row that a file's name or title tells, if there is one for the architecture.

    Args:
        names: file name without ending, titles.
        architecture: slug.
        lora: whether the file is a LoRA, or a model.
    """
    told = _folded(names)
    for row in DISTILLED:
        if architecture not in row.bases or (lora and not row.lora):
            continue
        if any(re.search(row.pattern, name) for name in told):
            return row
    return None


def steps_told(names: Iterable[str]) -> int | None:
    """The number of steps that names tell ("4step", "8-steps"), None if none or several."""
    pattern = re.compile(r"(?<!\d)([1-9]\d?)_?steps?")
    found = {int(number) for name in _folded(names) for number in pattern.findall(name)}
    return found.pop() if len(found) == 1 else None


def recipe_of(row: Distilled, names: Iterable[str]) -> Recipe:
    """The recipe of a row's member with these names."""
    told = _folded(names)
    for pattern, recipe in row.cases:
        if any(re.search(pattern, name) for name in told):
            return recipe
    return row.recipe
