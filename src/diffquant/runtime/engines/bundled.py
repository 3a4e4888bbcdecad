"""The bundled runtime as an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from diffquant import __version__
from diffquant.runtime.compute import card_of, engines_for
from diffquant.runtime.control import damaged
from diffquant.runtime.engines.base import EngineFiles, OnLatents, OnStep, Pictures
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.lora import attach
from diffquant.runtime.low_bit import LowBit, apply
from diffquant.runtime.opening import Opened, open_pipeline
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.synthetic import describe

__all__ = ["BundledSide", "open_side"]


@dataclass(frozen=True, slots=True)
class BundledSide:
    """An opened pipeline of ours.

    Attributes:
        synthetic: what its denoiser is shown instead of text; "": it reads prompts.
        graphs: what became of CUDA graphs, in each picture anew.
    """

    files: EngineFiles
    opened: Opened
    warnings: tuple[str, ...]
    low_bit: LowBit
    engine: str = f"diffquant {__version__}"
    synthetic: str = ""
    graphs: dict[str, None] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """Who read and ran the file; once it has run, what its layers were computed in."""
        return "; ".join(
            (
                "read and run by diffquant",
                *filter(None, (self.synthetic,)),
                *self.low_bit.said,
                *self.graphs,
            )
        )

    @property
    def size(self) -> tuple[int, int]:
        """Native (width, height)."""
        return self.opened.size

    def draw(
        self,
        request: PictureRequest,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Pictures:
        """Pictures (B, H, W, 3) in [0, 1]."""
        pipeline, device = self.opened.pipeline, self.files.device
        with Graphs("auto", pipeline.parts, device, request.steps) as graphs:
            made = pipeline.run(request, on_step=on_step)
        if torch.device(device).type == "cuda":
            self.graphs[graphs.said] = None
        if on_latents is not None:
            on_latents(made.latents.numpy())
        pictures: Pictures = made.images.numpy()
        return pictures

    @contextlib.contextmanager
    def damaged(self, *, rows: bool) -> Iterator[str | None]:
        """Shuffle the scales, or the rows, of one block of the part that is compared."""
        part = self.files.swapped[0][0] if self.files.swapped else "denoiser"
        with damaged(self.opened.modules[part], rows=rows) as block:
            where = {"denoiser": part}.get(block, block)  # the whole of it, where nothing repeats
            yield f"{'rows' if rows else 'scales'} of {where} shuffled"

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
        swapped=dict(files.swapped),
        synthetic=files.synthetic,
    )


def open_side(files: EngineFiles) -> BundledSide:
    """Open a model in the bundled runtime; weights stay packed, LoRAs are side branches.

    Where its layers multiply in 8 bits, the denoiser computes in bfloat16, as such products do.
    """
    card = card_of(files.device)
    low = bool(engines_for(files.compute, card)[0])
    opened = _opened(files, torch.bfloat16 if low or files.rough else None)
    uses = attach(opened, files.loras)
    found = apply(opened.pipeline.parts.denoiser, files.compute, card)
    texts = (text for use in uses for text in use.warnings)
    told = describe(opened.pipeline) if files.synthetic else ""
    return BundledSide(
        files, opened, (*opened.warnings, *texts, *found.warnings), found, synthetic=told
    )
