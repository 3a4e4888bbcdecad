"""A second pass over finished pictures: larger (hires), or by another model (a refiner).

The way leads through pixels: decode, resize with Lanczos' filter, encode, noise, denoise. So the
second model may be of any architecture, with latents of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.img2img import resize
from diffquant.runtime.pipeline import Generated, OnLatents, OnStep, Pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["again", "enlarged", "hires", "redraw"]

_LARGEST_FACTOR = 4.0


def hires(
    pipeline: Pipeline,
    request: PictureRequest,
    *,
    factor: float = 2.0,
    strength: float = 0.35,
    second: Pipeline | None = None,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Generated:
    """Make pictures, then draw them again larger.

    Args:
        pipeline: makes the pictures.
        request: what is wanted, in the size of the first pass.
        factor: of width and height, 1 to 4; sizes are rounded to what the second model takes.
        strength: how much of them is drawn anew.
        second: draws the larger pictures; None: the same pipeline.
        on_step: called in each pass with (done, total) of that pass.
        on_latents: likewise with (index, total, latents).

    Raises:
        UsageError: a factor or strength out of range, and what `Pipeline.denoise` refuses.
    """
    if request.begin > 0 or request.end < 1:
        raise UsageError("a run that leaves steps to another model makes no picture to enlarge")
    second = second or pipeline
    size = enlarged(second, request, factor)
    made = pipeline.run(request, on_step=on_step, on_latents=on_latents)
    return redraw(
        second,
        request,
        made.images,
        size=size,
        strength=strength,
        same=second is pipeline,
        on_step=on_step,
        on_latents=on_latents,
    )


def enlarged(second: Pipeline, request: PictureRequest, factor: float) -> tuple[int, int]:
    """Width and height of a second pass, rounded to what its model takes.

    Raises:
        UsageError: a factor out of range.
    """
    if not 1 <= factor <= _LARGEST_FACTOR:  # NaN too
        raise UsageError(f"hires factor must be 1 to {_LARGEST_FACTOR:g}, found {factor:g}")
    width, height = (
        max(1, round(size * factor / second.multiple)) * second.multiple
        for size in (request.width, request.height)
    )
    return width, height


def redraw(
    pipeline: Pipeline,
    request: PictureRequest,
    pictures: Tensor,
    *,
    size: tuple[int, int],
    strength: float,
    same: bool,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Generated:
    """Draw pictures (B, H, W, 3) again, partly, larger or by another model: see `again`."""
    wanted = again(pipeline, request, pictures, size=size, strength=strength, same=same)
    return pipeline.run(wanted, on_step=on_step, on_latents=on_latents)


def again(
    pipeline: Pipeline,
    request: PictureRequest,
    pictures: Tensor,
    *,
    size: tuple[int, int],
    strength: float,
    same: bool,
) -> PictureRequest:
    """The request that `redraw` runs.

    Prompts, seeds and steps are those of the request. What belongs to a model (sampler, schedule,
    guidance, lengths) is kept for the same one and left to the other's own; a negative prompt goes
    where the other is guided by one.
    """
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise UsageError(f"strength must be above 0 and at most 1, found {strength:g}")
    width, height = size
    wanted = replace(
        request,
        image=resize(pictures, width, height),
        mask=None,
        strength=strength,
        width=width,
        height=height,
    )
    if not same:
        wanted = replace(
            wanted,
            negative=wanted.negative if pipeline.cfg > 1 else None,
            cfg=None,
            cfg_cutoff=1.0,
            cfg_rescale=0.0,
            guidance=None,
            sampler=None,
            schedule=None,
            shift=None,
            eta=None,
            text_tokens=None,
            clip_skip=None,
        )
    return wanted
