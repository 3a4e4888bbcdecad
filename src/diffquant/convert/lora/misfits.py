"""Whether an adapter's parts fit the weight or the bias of a module, and why not."""

from __future__ import annotations

import math

from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.places import Module
from diffquant.convert.rules import Shape

__all__ = ["bias_misfit", "misfit"]


def misfit(adapter: Adapter, module: Module) -> str:
    """Why the parts do not fit the weight; empty when they do."""
    wanted, shape = adapter.shape, module.shape
    if wanted[0] in (None, shape[0]) and _tail_fits(adapter, shape[1:]):
        return _inner_misfit(adapter, shape[1:])
    found = tuple("?" if one is None else one for one in wanted)
    if all(isinstance(one, int) for one in found):
        return f"it is for a weight of shape {found}, the model has {shape}"
    return f"it is for a weight of {' x '.join(map(str, found))}, the model has {shape}"


def _tail_fits(adapter: Adapter, tail: Shape) -> bool:
    """Whether rows have the length, or the kernel, that the parts say; None says nothing."""
    wanted = adapter.shape[1:]
    if all(one is None for one in wanted):
        return True
    if None in wanted:
        return False
    inner = tuple(one for one in wanted if one is not None)
    if _trim(inner) == _trim(tail) or inner == (math.prod(tail),):
        return True
    return adapter.kind == "ia3" and inner == tail[:1]


def _inner_misfit(adapter: Adapter, tail: Shape) -> str:
    """What the weight's shape has to be beyond what `Adapter.shape` says."""
    if adapter.kind == "oft" and "oft_r" in adapter.parts:
        numbers = adapter.shapes["oft_r"][1]
        size = (1 + math.isqrt(1 + 8 * numbers)) // 2
        if math.prod(tail) % size:
            return f"its blocks have {size} columns, the weight's rows {math.prod(tail)}"
    return ""


def bias_misfit(adapter: Adapter, rows: int) -> str:
    """Why the parts do not fit the bias of a module with so many rows; empty when they do."""
    for role in ("diff_b", "b_norm", "up_bias"):
        size = math.prod(adapter.shapes[role]) if role in adapter.parts else rows
        if size != rows:
            return f"its bias has {size} numbers, the model's {rows}"
    return ""


def _trim(shape: Shape) -> Shape:
    """Without trailing ones: a 1x1 convolution is a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
