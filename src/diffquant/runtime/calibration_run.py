"""CalibrationRun: pictures that are made in order to measure the model, one per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffquant.runtime.opening import Opened, open_pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["CalibrationRun"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRun:
    """How the pictures are made.

    Attributes:
        seed: of the first picture; picture i starts from seed + i.
        steps: sampler steps per picture.
        cfg: guidance strength, None for the family's.
        guidance: distilled guidance of Flux dev.
        size: (width, height), None for the model's own.
        sampler: None for the model's own.
        device: torch device.
        dtype: compute dtype.
        base: where missing parts come from.
        vae: VAE file to use instead.
    """

    seed: int = 0
    steps: int = 20
    cfg: float | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    sampler: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    base: Path | None = None
    vae: Path | None = None

    def open(self, model: Path) -> Opened:
        """Open the model.

        Raises:
            DiffquantError: a part that is missing or does not fit.
        """
        dtype = getattr(torch, self.dtype)
        return open_pipeline(model, base=self.base, vae=self.vae, dtype=dtype, device=self.device)

    def requests(self, prompts: Sequence[str], opened: Opened) -> tuple[PictureRequest, ...]:
        """One request per prompt, of the size that was asked for or else the model's."""
        width, height = self.size or opened.size
        return tuple(
            PictureRequest(
                prompt,
                seed=self.seed + index,
                steps=self.steps,
                cfg=self.cfg,
                guidance=self.guidance,
                width=width,
                height=height,
                sampler=self.sampler,
            )
            for index, prompt in enumerate(prompts)
        )
