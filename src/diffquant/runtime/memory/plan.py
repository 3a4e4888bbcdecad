"""Rungs of the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Rung"]


@dataclass(frozen=True, slots=True)
class Rung:
    """How weights are placed and latents decoded.

    Attributes:
        level: none, model, blocks or sequential.
        decoder: whole, strips or host.
        pinned: whether streamed weights wait in page-locked host memory.
        resident: part -> blocks that stay on the device, at level blocks.
    """

    level: str
    decoder: str
    pinned: bool
    resident: Mapping[str, int]
