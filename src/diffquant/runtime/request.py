"""PictureRequest: everything that decides a picture besides the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PictureRequest"]


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """What is asked of a model; None leaves a choice to the model.

    Attributes:
        prompt: one, or several that run as one batch.
        negative: what to stay away from; needs cfg above 1.
        seed: one for the batch, or one per picture.
        batch: pictures per prompt.
        steps: sampler steps.
        cfg: strength of classifier-free guidance, 1 is off.
        cfg_cutoff: fraction of the run after which guidance is off.
        cfg_rescale: share of the guided prediction that is brought back to the size of the
            unguided one.
        guidance: distilled guidance, of models that take one.
        width, height: pixels.
        sampler, schedule: names; see docs/sampling.md.
        shift: of flow schedules.
        eta: noise of samplers that take one.
        text_tokens: length of the prompt for encoders without a fixed one.
        clip_skip: layers of CLIP left out at the end, 1 is none.
        prompt_style: how weights in a prompt act.
        rng: where noise comes from, "cpu" or "philox".
        image: (1 or B, H, W, 3) in [0, 1], to start from.
        strength: how much of `image` is made anew.
        mask: (1 or B, H, W) in [0, 1], 1 where `image` is painted over.
        begin, end: fractions of the trained noise range where the run begins and ends.
    """

    prompt: str | tuple[str, ...]
    negative: str | None = None
    seed: int | tuple[int, ...] = 0
    batch: int = 1
    steps: int = 20
    cfg: float | None = None
    cfg_cutoff: float = 1.0
    cfg_rescale: float = 0.0
    guidance: float | None = None
    width: int = 512
    height: int = 512
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    eta: float | None = None
    text_tokens: int | None = None
    clip_skip: int | None = None
    prompt_style: str = "comfy"
    rng: str = "cpu"
    image: Tensor | None = None
    strength: float = 0.75
    mask: Tensor | None = None
    begin: float = 0.0
    end: float = 1.0
