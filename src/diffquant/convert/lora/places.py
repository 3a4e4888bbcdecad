"""Which weights of a model a module's name means, in whatever naming the name is.

Names come from the architecture's own rules, applied to the model at hand, so no depth or width is
written here: canonical module names, Diffusers names (each made of rows of canonical weights), and
both again with underscores for dots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from diffquant.convert.architectures.base import Architecture, Component
from diffquant.convert.architectures.links import backward
from diffquant.convert.lora.group import Adapter
from diffquant.convert.rules import Piece, Rule, Shapes

__all__ = ["Names", "Place", "module_names"]

_Naming: TypeAlias = Literal["underscored", "dotted"]


@dataclass(frozen=True, slots=True)
class Place:
    """What a name means: rows of weights, or the reason why nothing can be done."""

    pieces: tuple[Piece, ...]
    reason: str = ""


_Index: TypeAlias = Mapping[tuple[_Naming, str], Place]


class Names:
    """What names mean in each part; made when they are first looked for."""

    def __init__(
        self, architecture: Architecture, parts: Mapping[str, Shapes], kinds: Mapping[str, str]
    ) -> None:
        self._architecture = architecture
        self._kinds = kinds
        self._parts = parts
        self._made: dict[tuple[str, str], _Index] = {}

    def _index(self, part: str, ending: str) -> _Index:
        if (part, ending) not in self._made:
            component = self._architecture.component(part, self._kinds.get(part, ""))
            self._made[part, ending] = _index(component, self._parts[part], ending)
        return self._made[part, ending]

    def find(self, adapter: Adapter, *, bias: bool) -> tuple[str, Place | None]:
        """The part an adapter is for and its place there; files that name no part mean any.

        Trainers count text encoders differently: a name that the one has not is looked for in the
        others.
        """
        ending = ".bias" if bias else ".weight"
        naming: _Naming = "underscored" if adapter.naming == "underscored" else "dotted"
        if adapter.part and adapter.part not in self._parts:
            return adapter.part, None
        others = [
            part for part in self._parts if not adapter.part or part.startswith("text_encoder")
        ]
        first = [adapter.part] if adapter.part else []
        searched = first + (others if adapter.part != "denoiser" else [])
        for part in searched:
            index = self._index(part, ending)
            if place := index.get((naming, adapter.module)):
                return part, place
            if place := _of_fused(adapter, index):
                return part, place
        return searched[0], None


def _of_fused(adapter: Adapter, index: _Index) -> Place | None:
    """XLabs' and USO's `linear1_qkv`: the first rows of a weight that holds more than qkv.

    Source: Comfy-Org/ComfyUI@17358c8:comfy/lora.py (model_lora_keys_unet keeps qkv first).
    """
    module = adapter.module.removesuffix("_qkv")
    place = index.get(("dotted", module))
    rows = adapter.shape[0] if adapter.shape else None
    if module == adapter.module or place is None or rows is None or len(place.pieces) != 1:
        return None
    piece = place.pieces[0]
    if piece.start + rows > piece.stop:
        return None
    return Place((Piece(piece.key, piece.start, piece.start + rows),))


def module_names(
    component: Component, shapes: Shapes, ending: str = ".weight"
) -> dict[str, tuple[Piece, ...]]:
    """Every dotted module name of a part, canonical, Diffusers and alternate, and what it means.

    Weights that Diffusers keeps transposed mean no rows: their pieces are empty.

    Args:
        component: the part.
        shapes: canonical key -> shape.
        ending: ".weight", or ".bias" for what the names' biases are.
    """
    endings = (ending, ".scale") if ending == ".weight" else (ending,)  # BFL's norms have a scale
    found: dict[str, tuple[Piece, ...]] = {
        key.removesuffix(last): (Piece(key, 0, shape[0]),)
        for last in endings
        for key, shape in shapes.items()
        if key.endswith(last) and shape
    }
    for rule in _other_namings(component, shapes):
        for one in rule.assignments(shapes):
            if one.target.endswith(ending):
                pieces = () if one.transpose or one.axis else one.pieces
                found.setdefault(one.target.removesuffix(ending), pieces)
    return found


def _other_namings(component: Component, shapes: Shapes) -> Sequence[Rule]:
    """Rules from canonical keys to the other naming in use: Diffusers', or transformers 5's."""
    if not component.same_names:
        return component.rules(shapes, "canonical", "diffusers")
    if "alternate" in component.signatures:  # its links lead to canonical names: walk them back
        return backward(component.links_of(shapes, "alternate"), shapes)
    return ()


def _index(component: Component, shapes: Shapes, ending: str) -> _Index:
    found: dict[tuple[_Naming, str], Place] = {}
    for name, pieces in module_names(component, shapes, ending).items():
        place = Place(pieces, "" if pieces else "the model keeps this weight transposed")
        found["dotted", name] = place
        flat: tuple[_Naming, str] = ("underscored", name.replace(".", "_"))
        if found.setdefault(flat, place) != place:
            found[flat] = Place((), "the name means more than one weight")
    return found
