"""A Recipe: what a picture says about how it was made, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Recipe", "UsedLora"]


@dataclass(frozen=True, slots=True)
class UsedLora:
    """A LoRA by name; `sha256` of its file where the picture says it."""

    name: str
    weight: float
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a picture was made.

    Attributes:
        origin: who wrote it: "diffquant", "a1111" or "comfyui".
        fields: option of `generate` (underscores for dashes) -> value; what is not said is absent.
        loras: in order.
        model: name of the model, "" where not said.
        fingerprint: of the model, "" where not said.
        notes: sentences about what could not be read.
        files: option of `generate` -> (name, sha256) of a file that the picture depends on.
    """

    origin: str
    fields: Mapping[str, Any]
    loras: tuple[UsedLora, ...]
    model: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    files: Mapping[str, tuple[str, str]] | None = None
