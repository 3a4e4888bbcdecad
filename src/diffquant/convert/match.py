"""Match: what a source is, and the assignments that lead from its names to others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from diffquant.convert.architectures.base import Layout
from diffquant.convert.architectures.parts import PARTS, architecture_named
from diffquant.convert.hyper import Hyper
from diffquant.convert.rules import Assignment, Piece, Shape, apply_rules

__all__ = ["Match", "PartMatch", "to_canonical", "to_diffusers", "to_layout"]


@dataclass(frozen=True, slots=True)
class PartMatch:
    """One part of a model inside a source.

    Attributes:
        name: denoiser, vae, text_encoder, text_encoder_2 ...
        kind: which model it is, as in `Component.kind`.
        layout: naming of the local keys; "alternate" is a naming that is read, never written.
        prefix: source key = prefix + local key ("unet/" in a folder).
        shapes: local key -> shape.
        hyper: config.json field -> value and origin.
        architecture: slug of the architecture it was found in, "" for a part in a file of its own.
    """

    name: str
    kind: str
    layout: Layout
    prefix: str
    shapes: Mapping[str, Shape]
    hyper: Mapping[str, Hyper]
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """What a source is.

    Attributes:
        architecture: slug, a key of ARCHITECTURES.
        variant: member of the family, "" when there is nothing to tell.
        layout: "diffusers" for a folder of parts, else "single".
        parts: those found, the denoiser first.
        evidence: what was concluded from what, and what cannot be told.
        leftovers: (key, reason) of keys no part claims.
        warnings: contradictions between the source's own statements.
        scheduler: scheduler_config.json field -> value and origin.
    """

    architecture: str
    variant: str
    layout: Literal["single", "diffusers"]
    parts: tuple[PartMatch, ...]
    evidence: tuple[str, ...]
    leftovers: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    scheduler: Mapping[str, Hyper] = field(default_factory=dict)

    def part(self, name: str) -> PartMatch | None:
        """The part of that name, if the source has it."""
        return next((one for one in self.parts if one.name == name), None)


def to_canonical(part: PartMatch) -> tuple[Assignment, ...]:
    """Assignments from source keys to canonical part-local keys; identity when already there."""
    return _assign(part, "canonical")


def to_layout(part: PartMatch, layout: Layout) -> tuple[Assignment, ...]:
    """Assignments from source keys to part-local keys in any layout that can be written."""
    return _assign(part, layout)


def to_diffusers(part: PartMatch) -> tuple[Assignment, ...]:
    """Assignments from source keys to Diffusers part-local keys; identity when already there."""
    return _assign(part, "diffusers")


def _assign(part: PartMatch, target: Layout) -> tuple[Assignment, ...]:
    component = (
        architecture_named(part.architecture).component(part.name, part.kind)
        if part.architecture
        else PARTS[part.kind].components[0]
    )
    rules = component.rules(part.shapes, part.layout, target)
    return tuple(
        replace(
            one,
            pieces=tuple(
                Piece(part.prefix + piece.key, piece.start, piece.stop) for piece in one.pieces
            ),
        )
        for one in apply_rules(rules, part.shapes)
    )
