"""Which part of a source bits are allocated to: the denoiser, or a text encoder on its own."""

from __future__ import annotations

from dataclasses import dataclass

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.parts import PARTS, TITLES, architecture_named
from diffquant.convert.encoders.files import ENCODER_FILES
from diffquant.convert.encoders.parts import gguf_part
from diffquant.convert.match import Match, PartMatch
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError

__all__ = ["AllocatedPart", "allocated_part", "named_part"]


@dataclass(frozen=True, slots=True)
class AllocatedPart:
    """What an allocation chooses for.

    Attributes:
        match: the part.
        architecture: whose policy decides what it could have.
        count: parts that the output holds; keys are prefixed by it.
        targets: programs that read it, where it has readers of its own; else ().
    """

    match: PartMatch
    architecture: Architecture
    count: int
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As plans and recipes call it."""
        return self.match.name

    @property
    def told(self) -> str:
        """As people are told."""
        return named_part(self.name)


def named_part(name: str) -> str:
    """A part in a sentence."""
    return "the denoiser" if name == "denoiser" else name


def allocated_part(match: Match, request: Request, asked: str) -> AllocatedPart:
    """Find the one part that a budget is spent on.

    Args:
        match: of the source.
        request: what to write.
        asked: the budget's text, for messages.

    Raises:
        UsageError: several parts, none, or one that bits are not allocated to.
    """
    gguf = request.container == "gguf"
    part = gguf_part(match, request.parts) if gguf else _of_file(match, request)
    if part.name != "denoiser" and part.kind not in TITLES:
        raise UsageError(
            f"{asked}: bits are allocated to denoisers and text encoders, and {part.name} is a "
            f"{part.kind}: quantize it by type"
        )
    encoder = ENCODER_FILES.get(part.kind) if gguf else None
    return AllocatedPart(
        part,
        PARTS[part.kind] if encoder else architecture_named(match.architecture),
        1 if gguf or request.parts else len(match.parts),
        encoder.targets if encoder else (),
    )


def _of_file(match: Match, request: Request) -> PartMatch:
    """The named part, the denoiser, or the only one of a .safetensors output."""
    have = {part.name: part for part in match.parts}
    if request.parts:
        name = request.parts[0]
        if name not in have:
            raise UsageError(
                f"no part {name} in this {match.architecture} source (it has: {', '.join(have)})"
            )
        return have[name]
    return have.get("denoiser", match.parts[0])  # without one it is a part in a file of its own
