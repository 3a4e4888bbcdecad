"""The bundled runtime as an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from diffquant import __version__
from diffquant.runtime.compute import card_of, engines_for
from diffquant.runtime.control import damaged
from diffquant.runtime.engines.base import EngineFiles, OnStep, Pictures
from diffquant.runtime.lora import attach
from diffquant.runtime.low_bit import LowBit, apply
from diffquant.runtime.opening import Opened, open_pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["BundledSide", "open_side"]


@dataclass(frozen=True, slots=True)
class BundledSide:
    """An opened pipeline of ours."""

    files: EngineFiles
    opened: Opened
    warnings: tuple[str, ...]
    low_bit: LowBit
    engine: str = f"diffquant {__version__}"

    @property
    def how(self) -> str:
        """Who read and ran the file; once it has run, what its layers were computed in."""
        rows = "; ".join(("", *self.low_bit.said))
        return f"read and run by diffquant{rows}"

    @property
    def size(self) -> tuple[int, int]:
        """Native (width, height)."""
        return self.opened.size

    def draw(self, request: PictureRequest, on_step: OnStep | None = None) -> Pictures:
        """Pictures (B, H, W, 3) in [0, 1]."""
        made = self.opened.pipeline.run(request, on_step=on_step)
        pictures: Pictures = made.images.numpy()
        return pictures

    @contextlib.contextmanager
    def damaged(self, *, rows: bool) -> Iterator[str | None]:
        """Shuffle the scales, or the rows, of one block."""
        with damaged(self.opened.pipeline.parts.denoiser, rows=rows) as block:
            yield f"{'rows' if rows else 'scales'} of {block} shuffled"

    @contextlib.contextmanager
    def rough(self) -> Iterator[Self | None]:
        """Open the model again, its denoiser in bfloat16."""
        opened = _opened(self.files, torch.bfloat16)
        attach(opened, self.files.loras)
        yield replace(self, opened=opened)


def _opened(files: EngineFiles, denoiser: torch.dtype | None) -> Opened:
    return open_pipeline(
        files.model,
        base=files.base,
        vae=files.vae,
        dtype=getattr(torch, files.dtype),
        device=files.device,
        denoiser_dtype=denoiser,
    )


def open_side(files: EngineFiles) -> BundledSide:
    """Open a model in the bundled runtime; weights stay packed, LoRAs are side branches.

    Where its layers multiply in 8 bits, the denoiser computes in bfloat16, as such products do.
    """
    card = card_of(files.device)
    low = bool(engines_for(files.compute, card)[0])
    opened = _opened(files, torch.bfloat16 if low else None)
    uses = attach(opened, files.loras)
    found = apply(opened.pipeline.parts.denoiser, files.compute, card)
    texts = (text for use in uses for text in use.warnings)
    return BundledSide(files, opened, (*opened.warnings, *texts, *found.warnings), found)
