"""Reading key sets: how long a module list is, how wide a layer."""

from __future__ import annotations

from diffquant.convert.rules import Shapes

__all__ = ["count", "width"]


def count(shapes: Shapes, prefix: str) -> int:
    """Length of the module list at `prefix`: one more than its highest index, 0 when absent."""
    head = f"{prefix}."
    size = len(head)
    found = {key[size:].partition(".")[0] for key in shapes if key.startswith(head)}
    return max((int(one) + 1 for one in found if one.isdigit()), default=0)


def width(shapes: Shapes, key: str, axis: int) -> int | None:
    """Size of one axis of `key`; None when the key or the axis is not there."""
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) > axis else None
