"""plan_run(): the memory plan of a request with an opened model, before a weight is read."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffquant.convert.footprint import Footprint, Picture, parts_footprint
from diffquant.core.errors import PlanMismatch
from diffquant.runtime.guidance import needs_negative
from diffquant.runtime.memory.budget import Asked, available
from diffquant.runtime.memory.parts import part_source
from diffquant.runtime.memory.plan import MemoryPlan, plan_memory
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.opening import Opened
from diffquant.runtime.request import PictureRequest

__all__ = ["footprint_of", "place", "plan_run"]

_STORAGE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def footprint_of(opened: Opened, request: PictureRequest) -> Footprint:
    """What a request takes, part by part."""
    device = _placement_device(opened)
    modules = opened.modules
    sources = {
        name: part_source(logical, part, dtype=param_dtype(modules[name]), device=str(device))
        for name, (logical, part) in opened.sources.items()
    }
    dtype = param_dtype(modules["denoiser"])
    return parts_footprint(
        sources,
        Picture(request.width, request.height, len(request.prompts), _STORAGE[dtype]),
        architecture=opened.architecture,
        variant=opened.variant,
        guided=_guided(opened, request),
        from_picture=request.image is not None,
    )


def plan_run(
    opened: Opened, request: PictureRequest, asked: Asked, *, extra: int = 0
) -> MemoryPlan:
    """Choose how to place the weights for a request.

    Args:
        opened: the model.
        request: what is made.
        asked: what memory may be taken.
        extra: bytes that weights take more on the device than in the file (low_bit.py); counted
            with what the device takes for itself, at every level, since that is known beforehand.

    Raises:
        ResourceError: nothing that was asked for fits.
    """
    device = _placement_device(opened)
    budget = available(device, asked)
    if extra:
        budget = replace(budget, context=budget.own(device.type) + extra)
    return plan_memory(
        footprint_of(opened, request),
        budget,
        device=device.type,
        level=asked.offload,
        decoder=asked.decoder,
    )


def place(opened: Opened, plan: MemoryPlan) -> None:
    """Place the weights by a plan from now on; what is on the device stays where it fits it."""
    if opened.placement is None:
        raise PlanMismatch("a model whose weights were loaded cannot be placed")
    opened.placement.settle(plan.rung, plan.ladder)


def _placement_device(opened: Opened) -> torch.device:
    if opened.placement is None:
        raise PlanMismatch("a model whose weights were loaded needs no plan")
    return opened.placement.device


def _guided(opened: Opened, request: PictureRequest) -> bool:
    """Whether a step predicts twice, as Pipeline.denoise decides it."""
    family = opened.pipeline.family
    if not needs_negative(family.cfg if request.cfg is None else request.cfg):
        return False
    return request.negative is not None or family.nothing is not None or not family.flow
