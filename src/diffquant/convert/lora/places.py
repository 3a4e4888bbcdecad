"""Which weights of a model a module's name means, in whatever naming the name is.

Names come from the architecture's own rules, applied to the model at hand, so no depth or width is
written here: canonical module names, Diffusers names (each made of rows of canonical weights), and
both again with underscores for dots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant.convert.architectures.base import Component
from diffquant.convert.architectures.links import backward
from diffquant.convert.rules import Assignment, Piece, Rule, Shape, Shapes
from diffquant.core.errors import NotInvertible

__all__ = ["Module", "Names", "module_of", "modules_of", "names_of"]


@dataclass(frozen=True, slots=True)
class Module:
    """One module under one of its names.

    Attributes:
        name: dotted.
        pieces: rows of canonical tensors, in the module's order; empty where it is no whole rows.
        shape: of its weight, (N, K, ...), or its bias.
        transposed: the one canonical weight is the transpose of the module's, all of it.
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: Shape
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """Every name that is understood -> module; None where it means more than one."""

    dotted: Mapping[str, Module | None]
    underscored: Mapping[str, Module | None]


def modules_of(component: Component, shapes: Shapes, ending: str = ".weight") -> dict[str, Module]:
    """Every dotted module name of a part, canonical, Diffusers' and alternate, and what it means.

    Args:
        component: the part.
        shapes: canonical key -> shape.
        ending: ".weight", or ".bias" for what the names' biases are.
    """
    endings = (ending, ".scale") if ending == ".weight" else (ending,)  # BFL's norms have a scale
    found = {
        name: Module(name, (Piece(key, 0, shape[0]),), shape)
        for last in endings
        for key, shape in shapes.items()
        if key.endswith(last) and shape
        for name in (key.removesuffix(last),)
    }
    try:
        rules = _other_namings(component, shapes)
        for one in _assigned(rules, shapes, ending):
            module = _as_canonical(module_of(one, shapes, ending), shapes)
            found.setdefault(module.name, module)
    except NotInvertible:  # the names there are
        pass
    return found


def module_of(one: Assignment, shapes: Shapes, ending: str = ".weight") -> Module:
    """The module whose weight, or bias, an assignment makes of canonical tensors."""
    name = one.target.removesuffix(ending)
    if one.transpose and len(one.pieces) == 1:
        piece = one.pieces[0]
        whole = (piece.start, piece.stop) == (0, shapes[piece.key][0])
        return Module(name, one.pieces if whole else (), one.shape, transposed=True)
    return Module(name, () if one.transpose or one.axis else one.pieces, one.shape)


def _as_canonical(module: Module, shapes: Shapes) -> Module:
    """With the kernel that the canonical weight has: Diffusers may write 1x1 ones as matrices."""
    if module.transposed or not module.pieces:
        return module
    rows = sum(piece.stop - piece.start for piece in module.pieces)
    return replace(module, shape=(rows, *shapes[module.pieces[0].key][1:]))


def names_of(modules: Iterable[Module]) -> Names:
    """An index of modules by dotted and by underscored names."""
    dotted: dict[str, Module | None] = {}
    underscored: dict[str, Module | None] = {}
    for one in modules:
        dotted[one.name] = one
        known = underscored.setdefault(one.name.replace(".", "_"), one)
        if known is not None and known.pieces != one.pieces:
            underscored[one.name.replace(".", "_")] = None
    return Names(dotted, underscored)


def _other_namings(component: Component, shapes: Shapes) -> Sequence[Rule]:
    """Rules from canonical keys to the other naming in use: Diffusers', or transformers 5's."""
    if not component.same_names:
        return component.rules(shapes, "canonical", "diffusers")
    if "alternate" in component.signatures:  # its links lead to canonical names: walk them back
        return backward(component.links_of(shapes, "alternate"), shapes)
    return ()


def _assigned(rules: Sequence[Rule], shapes: Shapes, ending: str) -> Iterable[Assignment]:
    return (
        one for rule in rules for one in rule.assignments(shapes) if one.target.endswith(ending)
    )
