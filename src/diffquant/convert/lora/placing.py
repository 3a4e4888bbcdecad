"""Where the adapters of a file belong in a model, each with the reason where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from diffquant.convert.lora.base import same_shape
from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.modules import Model, Module
from diffquant.convert.rules import Piece

__all__ = ["Placed", "Verdict", "place_adapters"]

Verdict: TypeAlias = Literal["matched", "unmatched", "shape_mismatch"]
_VECTORS = ("norm", "full")


@dataclass(frozen=True, slots=True)
class Placed:
    """One adapter and the module it means.

    Attributes:
        adapter: as grouped.
        part: of the model; "" where none has such a module.
        module: of the model; None where there is none.
        verdict: whether it fits.
        reason: why it does not.
    """

    adapter: Adapter
    part: str
    module: Module | None
    verdict: Verdict
    reason: str = ""


def place_adapters(adapters: Sequence[Adapter], model: Model) -> tuple[Placed, ...]:
    """Find each adapter's module; no two may mean the same rows."""
    taken: dict[tuple[str, Piece, bool], str] = {}
    placed = []
    for adapter in adapters:
        one = _place(adapter, model)
        if one.verdict == "matched" and one.module is not None:
            vector = adapter.kind in _VECTORS and len(one.adapter.shapes) == 1
            rows = [(one.part, piece, vector) for piece in one.module.pieces]
            if other := next((taken[row] for row in rows if row in taken), ""):
                why = f"{other} already means the same weight"
                one = Placed(adapter, one.part, one.module, "unmatched", why)
            else:
                taken.update(dict.fromkeys(rows, adapter.name))
        placed.append(one)
    return tuple(placed)


def _place(adapter: Adapter, model: Model) -> Placed:
    if adapter.naming == "counted":
        why = "its layers are numbered, and the shapes do not tell which is which"
        return Placed(adapter, "", None, "unmatched", why)
    parts = [adapter.part] if adapter.part else list(model.parts)
    for name in parts:
        part = model.parts.get(name)
        if part is None:
            return Placed(adapter, name, None, "unmatched", f"the model has no {name}")
        index = part.underscored if adapter.naming == "underscored" else part.dotted
        if adapter.module not in index:
            continue
        module = index[adapter.module]
        if module is None:
            return Placed(adapter, name, None, "unmatched", "the name means more than one weight")
        if not module.pieces:
            why = "the model keeps this weight transposed"
            return Placed(adapter, name, None, "unmatched", why)
        if not same_shape(adapter.shape, module.shape):
            found = tuple("?" if size is None else size for size in adapter.shape)
            why = (
                f"it is for a weight of shape {_sizes(found)}, the model has {_sizes(module.shape)}"
            )
            return Placed(adapter, name, module, "shape_mismatch", why)
        return Placed(adapter, name, module, "matched")
    where = adapter.part or "model"
    return Placed(adapter, adapter.part, None, "unmatched", f"the {where} has no such layer")


def _sizes(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape))
