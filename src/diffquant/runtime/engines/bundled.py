"""The bundled runtime as an engine.

On a card, or where memory is asked for, weights stay in their files until a picture needs them, and
are placed by a plan, as `generate` does it. One model is on the device at a time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from diffquant import __version__
from diffquant.runtime.compute import card_of, engines_for
from diffquant.runtime.control import damaged
from diffquant.runtime.engines.base import EngineFiles, OnLatents, OnStep, Pictures
from diffquant.runtime.few_rows import serve_few_rows
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.lora import attach
from diffquant.runtime.low_bit import LowBit, apply
from diffquant.runtime.memory.budget import Asked, capped
from diffquant.runtime.memory.placement import Placement
from diffquant.runtime.memory.planning import place, plan_run
from diffquant.runtime.opening import Opened, open_pipeline
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.synthetic import describe

__all__ = ["BundledSide", "open_side"]

# Whose weights are on a device, planned for what; another side's go when it draws.
_there: list[tuple[weakref.ref[Placement], tuple[int | None, ...]]] = []


@dataclass(frozen=True, slots=True, weakref_slot=True)
class BundledSide:
    """An opened pipeline of ours.

    Attributes:
        synthetic: what its denoiser is shown instead of text; "": it reads prompts.
        graphs: what became of CUDA graphs, in each picture anew.
        placed: how weights were placed.
        troubles: what did not go as planned: memory that ran out, a graph that could not be made.
    """

    files: EngineFiles
    opened: Opened
    odd: tuple[str, ...]
    low_bit: LowBit
    engine: str = f"diffquant {__version__}"
    synthetic: str = ""
    graphs: dict[str, None] = field(default_factory=dict)
    placed: dict[str, None] = field(default_factory=dict)
    troubles: dict[str, None] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was guessed or odd on opening, and what did not go as planned since."""
        return (*self.odd, *self.troubles)

    @property
    def how(self) -> str:
        """Who read and ran the file; once it has run, what its layers were computed in."""
        return "; ".join(
            (
                "read and run by diffquant",
                *filter(None, (self.synthetic,)),
                *self.low_bit.said,
                *self.placed,
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
        pipeline, device = self.opened.pipeline, torch.device(self.files.device)
        with contextlib.ExitStack() as stack:
            if self.opened.placement is not None:
                stack.enter_context(capped(device, self.files.memory))
                self._place(self.opened.placement, request)
            graphs = Graphs("auto", pipeline.parts, self.files.device, request.steps)
            with graphs:
                made = pipeline.run(request, on_step=on_step)
        if device.type == "cuda":
            self.graphs[graphs.said] = None
        if graphs.warning:
            self.troubles[graphs.warning] = None
        if self.opened.placement is not None:
            self.troubles.update(dict.fromkeys(self.opened.placement.steps))
        if on_latents is not None:
            on_latents(made.latents.numpy())
        pictures: Pictures = made.images.numpy()
        return pictures

    def _place(self, mine: Placement, request: PictureRequest) -> None:
        """Plan for a picture; what another side has on the device goes first.

        A picture like the last one finds things as that left them: where memory had run out,
        another plan would let it run out again.
        """
        alike = (request.width, request.height, request.batch)
        for ref, planned in _there:
            other = ref()
            if other is mine and planned == alike:
                return
            if other is not None and other is not mine:
                other.release()
        _there[:] = [(weakref.ref(mine), alike)]
        plan = plan_run(self.opened, request, self.files.memory, extra=self.low_bit.nbytes)
        place(self.opened, plan)
        decode = "" if plan.rung.decoder == "whole" else f", decode {plan.rung.decoder}"
        peak = plan.peak_nbytes / (1 << 30)
        self.placed[f"offload {plan.rung.level}{decode}, {peak:.2f} GiB predicted"] = None

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
        with contextlib.ExitStack() as files:
            opened = _opened(self.files, torch.bfloat16, files)
            attach(opened, self.files.loras)
            serve_few_rows(opened.pipeline.parts.denoiser, card_of(self.files.device))
            yield replace(self, opened=opened)


def _opened(
    files: EngineFiles, denoiser: torch.dtype | None, stack: contextlib.ExitStack
) -> Opened:
    """Open the pipeline; where memory is planned, its files stay open in `stack`."""
    planned = torch.device(files.device).type != "cpu" or files.memory != Asked()
    opened = open_pipeline(
        files.model,
        base=files.base,
        vae=files.vae,
        dtype=getattr(torch, files.dtype),
        device=files.device,
        denoiser_dtype=denoiser,
        swapped=dict(files.swapped),
        synthetic=files.synthetic,
        files=stack if planned else None,
    )
    if opened.placement is not None:
        stack.callback(opened.placement.release)
    return opened


def open_side(files: EngineFiles) -> BundledSide:
    """Open a model in the bundled runtime; weights stay packed, LoRAs are side branches.

    Where its layers multiply in 8 bits, the denoiser computes in bfloat16, as such products do.
    """
    card = card_of(files.device)
    low = bool(engines_for(files.compute, card)[0])
    with contextlib.ExitStack() as stack:  # closed here where something fails
        opened = _opened(files, torch.bfloat16 if low or files.rough else None, stack)
        uses = attach(opened, files.loras)
        found = apply(opened.pipeline.parts.denoiser, files.compute, card)
        kept = stack.pop_all()
    texts = (text for use in uses for text in use.warnings)
    told = describe(opened.pipeline) if files.synthetic else ""
    side = BundledSide(
        files, opened, (*opened.warnings, *texts, *found.warnings), found, synthetic=told
    )
    weakref.finalize(side, kept.close)
    return side
