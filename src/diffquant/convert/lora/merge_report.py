"""What merging LoRAs did, as frozen data: per file, and per weight that changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LayerRow", "LoraRow", "MergeReport"]


@dataclass(frozen=True, slots=True)
class LoraRow:
    """One file.

    Attributes:
        path: of the file.
        weight: strength in the denoiser.
        encoder_weight: strength in text encoders.
        base: architecture it looks made for.
        kinds: LoRA, DoRA ... -> layers merged.
        merged: layers merged.
        written: of these, layers whose part is in the output.
        largest: the largest change in proportion to its weight, infinite where that is zero;
            None in a dry run.
        largest_key: the weight that has it.
        absent: part -> layers for it, where the model does not have the part, or it is not written.
        skipped: (layer, reason) of those left out.
        ignored: (tensor, reason) of those that are part of no layer.
        recipe: how its makers use it, where its name tells that it was distilled.
    """

    path: str
    weight: float
    encoder_weight: float
    base: str
    kinds: Mapping[str, int]
    merged: int
    written: int
    largest: float | None
    largest_key: str
    absent: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    recipe: str


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One weight that changed.

    Attributes:
        part: of the model.
        key: canonical.
        change: norm of all changes over that of the weight; None where the weight is zero.
        survival: 1 - |Q(W + D) - (W + D)| / |D|, at least 0: how much of the change D outlives the
            rounding Q of the output. W is on the grid of its own format, so that where Q is that
            format Q(W) = W, and 0 means that rounding undid the change. None where the base was
            not packed, or the output is not.
    """

    part: str
    key: str
    change: float | None
    survival: float | None = None


@dataclass(frozen=True, slots=True)
class MergeReport:
    """All files, in the order they were added, and all weights they changed.

    Attributes:
        loras: per file.
        layers: per weight; empty in a dry run.
        survival: median of the weights' survivals, None where there is none.
    """

    loras: tuple[LoraRow, ...]
    layers: tuple[LayerRow, ...]
    survival: float | None = None
