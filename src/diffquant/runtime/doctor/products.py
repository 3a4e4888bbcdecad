"""What multiplies in 8 bits on a device, and why: `compute.engine_for`, a row per kind."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Products", "products"]

_OLDEST = 80  # of a card that is supposed: what the planner supposes too


@dataclass(frozen=True, slots=True)
class Products:
    """How a device serves `--compute` fp8 or int8.

    Attributes:
        device: as torch names it.
        kind: fp8 or int8.
        engine: what multiplies; "": nothing does, layers are computed exactly.
        reason: why this one, or why none.
    """

    device: str
    kind: str
    engine: str
    reason: str


def products(device: str, *, supposed: bool) -> tuple[Products, ...]:
    """Look up each kind.

    Args:
        device: of torch.
        supposed: whether it is not here; a card is of capability 8.0 then.
    """
    from diffquant.runtime.compute import KINDS, Card, Engine, card_of, engine_for

    kind = device.partition(":")[0]
    card = Card(kind, _OLDEST if kind == "cuda" else 0) if supposed else card_of(device)
    rows = []
    for one in KINDS:
        found = engine_for(one, card)
        engine = found.name if isinstance(found, Engine) else ""
        rows.append(Products(device, one, engine, found.reason))
    return tuple(rows)
