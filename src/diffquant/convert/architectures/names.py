"""Reading key sets: how long a module list is, how wide a layer.

Recognition asks this of the same names many times: `Named` shapes count their lists once.
"""

from __future__ import annotations

import re

from diffquant.convert.rules import Shape, Shapes

__all__ = ["Named", "count", "width"]

_INDEX = re.compile(r"\.(\d+)(?![^.])")


class Named(dict[str, Shape]):
    """Shapes by key, with the lengths of all module lists, counted when first asked for."""

    _found: dict[str, int] | None = None

    def length(self, prefix: str) -> int:
        """Length of the module list at `prefix`, 0 when there is none."""
        if self._found is None:
            self._found = _lengths(self)
        return self._found.get(prefix, 0)


def _lengths(shapes: Shapes) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in shapes:
        for index in _INDEX.finditer(key):
            prefix, size = key[: index.start()], int(index[1]) + 1
            if found.get(prefix, 0) < size:
                found[prefix] = size
    return found


def count(shapes: Shapes, prefix: str) -> int:
    """Length of the module list at `prefix`: one more than its highest index, 0 when absent."""
    if isinstance(shapes, Named):
        return shapes.length(prefix)
    head = f"{prefix}."
    size = len(head)
    found = {key[size:].partition(".")[0] for key in shapes if key.startswith(head)}
    return max((int(one) + 1 for one in found if one.isdigit()), default=0)


def width(shapes: Shapes, key: str, axis: int) -> int | None:
    """Size of one axis of `key`; None when the key or the axis is not there."""
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) > axis else None
