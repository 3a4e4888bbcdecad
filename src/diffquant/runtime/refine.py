"""SDXL's ensemble of experts: the base walks the noisy part of a run, the refiner the rest.

Both walk the same noise levels; at the switch the latents go over as they are, and no noise is
added. Source: arXiv:2307.01952 section 2.5; huggingface/diffusers 0.42 docs, denoising_end and
denoising_start. A refiner that draws finished pictures again is `hires.redraw`.
"""

from __future__ import annotations

from dataclasses import replace

from diffquant.core.errors import UsageError
from diffquant.runtime.pipeline import Generated, OnLatents, OnStep, Pipeline
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.samplers import default_sampler

__all__ = ["parted", "refine"]


def refine(
    base: Pipeline,
    refiner: Pipeline,
    request: PictureRequest,
    *,
    switch: float = 0.8,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Generated:
    """Make pictures with two models in one run.

    Args:
        base: starts from noise.
        refiner: ends at the picture; of the same latent space.
        request: what is wanted; clip skip is the base's.
        switch: share of the noise range that the base walks.
        on_step: called in each part with (done, total) of that part.
        on_latents: likewise with (index, total, latents).

    Raises:
        UsageError: models that do not share latents, a switch out of range, a mask, and what
            `Pipeline.denoise` refuses.
    """
    first, rest = parted(base, refiner, request, switch=switch)
    left = base.denoise(first, on_step=on_step, on_latents=on_latents)
    made = refiner.run(rest, latents=left.latents, on_step=on_step, on_latents=on_latents)
    cut = tuple(dict.fromkeys(left.truncated + made.truncated))
    return replace(made, calls=left.calls + made.calls, truncated=cut)


def parted(
    base: Pipeline, refiner: Pipeline, request: PictureRequest, *, switch: float
) -> tuple[PictureRequest, PictureRequest]:
    """The two requests that `refine` runs; see there."""
    if not 0 < switch < 1:
        raise UsageError(f"the refiner's switch must be between 0 and 1, found {switch:g}")
    if request.begin > 0 or request.end < 1:
        raise UsageError("the switch says where each model begins and ends: leave begin and end")
    if request.mask is not None:
        raise UsageError("a refiner takes no mask: inpaint first, then redraw the picture with it")
    _check_latents(base, refiner)
    name = request.sampler or default_sampler(base.parts.scheduler, flow=base.family.flow)
    first = replace(request, end=switch, sampler=name)
    return first, replace(request, begin=switch, sampler=name, image=None, clip_skip=None)


def _check_latents(base: Pipeline, refiner: Pipeline) -> None:
    """Refuse a hand-over between models whose latents mean different things."""
    facts = []
    for one in (base, refiner):
        config = one.parts.vae.config
        scale = getattr(config, "scaling_factor", None)
        facts.append((config.latents, config.factor, scale, one.family.flow))
    if facts[0] != facts[1]:
        names = base.parts.architecture, refiner.parts.architecture
        raise UsageError(
            f"{names[1]} cannot go on from latents of {names[0]}: channels, factor, scale or kind "
            f"differ, {facts[0]} and {facts[1]}; draw the finished picture again instead (hires)"
        )
