"""Families of models that can make pictures: one row per architecture."""

from collections.abc import Mapping

from diffquant.runtime.families.base import (
    Call,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
)
from diffquant.runtime.families.flux import FLUX
from diffquant.runtime.families.flux2 import FLUX2
from diffquant.runtime.families.qwen_image import QWEN_IMAGE
from diffquant.runtime.families.sd import SD
from diffquant.runtime.families.sdxl import REFINER, SDXL
from diffquant.runtime.families.z_image import Z_IMAGE

__all__ = [
    "FAMILIES",
    "Call",
    "Conditions",
    "Family",
    "PipelineParts",
    "Text",
    "TextOptions",
]

FAMILIES: Mapping[str, Family] = {
    "sd15": SD,
    "sd2": SD,
    "sdxl": SDXL,
    "sdxl_refiner": REFINER,
    "flux1": FLUX,
    "flux2": FLUX2,
    "z_image": Z_IMAGE,
    "qwen_image": QWEN_IMAGE,
}
