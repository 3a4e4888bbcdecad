"""PictureRequest: everything that decides a picture besides the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PictureRequest"]


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """What to draw; the names are those of the command line's options.

    Attributes:
        seed: one for the batch (the next picture has the next seed), or one per picture.
        text_tokens: length for text encoders that have no fixed one.
        image: (1 or B, H, W, 3) in [0, 1], to start from.
        mask: (1 or B, H, W) in [0, 1], 1 is painted anew.
        begin, end: part of the trained noise range that is run.
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
