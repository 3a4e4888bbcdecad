"""The passes of a run: the picture, its refiner, its second pass; each with a model and a request.

They are known before a weight is read, so that each can be planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffquant.core.errors import UsageError
from diffquant.runtime.hires import again, enlarged
from diffquant.runtime.job import Job
from diffquant.runtime.memory.plan import MemoryPlan
from diffquant.runtime.opening import Opened
from diffquant.runtime.refine import parted
from diffquant.runtime.request import PictureRequest

__all__ = ["Pass", "Placed", "passes_of", "placed", "release"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One way from noise to latents.

    Attributes:
        label: denoise, refine or hires.
        path: of the model.
        opened: the model.
        request: what it runs; of hires, one like it.
    """

    label: str
    path: Path
    opened: Opened
    request: PictureRequest


@dataclass(frozen=True, slots=True)
class Placed:
    """How a pass places the weights of its model.

    Attributes:
        label: denoise, refine or hires.
        model: its file or folder.
        plan: before the first byte moved.
        steps: what did not go as planned: memory that ran out, and where the run went on.
    """

    label: str
    model: str
    plan: MemoryPlan
    steps: tuple[str, ...] = ()


def passes_of(
    job: Job,
    opened: Opened,
    extra: Mapping[Path, Opened],
    request: PictureRequest,
    settings: Mapping[str, Any],
) -> Iterator[Pass]:
    """The picture, its refiner and its second pass.

    Raises:
        UsageError: a model of a second pass without one.
    """
    first = request
    if job.refiner is not None:
        refiner, switch = extra[job.refiner], settings["refiner_switch"]
        first, last = parted(opened.pipeline, refiner.pipeline, request, switch=switch)
    yield Pass("denoise", job.model, opened, first)
    if job.refiner is not None:
        yield Pass("refine", job.refiner, refiner, last)
    if "hires" in settings:
        path = job.model if job.hires_model is None else job.hires_model
        model = extra.get(path, opened)
        width, height = enlarged(model.pipeline, request, settings["hires"])
        nothing = torch.zeros(1, 1, 1, 3)  # there is no picture yet; its size is what counts
        yield Pass(
            "hires",
            path,
            model,
            again(
                model.pipeline,
                request,
                nothing,
                size=(width, height),
                strength=settings["hires_strength"],
                same=model is opened,
            ),
        )
    elif job.hires_model is not None:
        raise UsageError("--hires-model needs --hires, such as --hires 2")


def placed(one: Pass, plan: MemoryPlan) -> Placed:
    """What became of a pass's plan."""
    placement = one.opened.placement
    steps = tuple(placement.steps) if placement is not None else ()
    return Placed(one.label, str(one.path), plan, steps)


def release(opened: Opened) -> None:
    """Take a model's weights off the device, where they can come again."""
    if opened.placement is not None:
        opened.placement.release()
