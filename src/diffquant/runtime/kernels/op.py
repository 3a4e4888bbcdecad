"""Decoding as one operator of torch's, so that `torch.compile` sees a call and nothing inside it.

A graph that holds the operator asks `best` when it runs, on the device it runs on. Outside of a
graph the routine is called straight: the dispatcher would only cost time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.reference import KERNELS
from diffquant.runtime.kernels.table import best, is_stored

__all__ = ["decode"]


# Not torch.library.custom_op, which does the same through three more layers of Python: 63 us a call
# where this takes 19, and a step makes hundreds. Tensors come as a list, since schemas know no
# mapping; `names` are theirs, joined by commas.
_OPERATORS = torch.library.Library("diffquant", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "dequantize(Tensor[] parts, str names, str fmt, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dequantize(
    parts: list[Tensor], names: str, fmt: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    kernel = best(fmt, parts[0].device.type, dtype).kernel
    return kernel(dict(zip(names.split(","), parts, strict=True)), tuple(shape), dtype)


def _shape_only(
    parts: list[Tensor], names: str, fmt: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    del names, fmt
    return parts[0].new_empty(shape, dtype=dtype)


_OPERATORS.impl(  # type: ignore[no-untyped-call]
    "dequantize", _dequantize, "CompositeExplicitAutograd"
)
torch.library.register_fake("diffquant::dequantize", _shape_only, lib=_OPERATORS)
_OPERATOR = torch.ops.diffquant.dequantize.default


def decode(fmt: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Decode a weight by the best routine for the device its parts are on.

    Args:
        fmt: number format.
        parts: stored tensors by name, all on one device.
        shape: logical shape.
        dtype: of the result.
    """
    if not torch.compiler.is_compiling():
        device = parts["weight"].device.type
        return best(fmt, device, dtype).kernel(parts, shape, dtype)
    if is_stored(fmt, dtype):  # an operator may not return what it was given
        return KERNELS[fmt](parts, shape, dtype)
    found: Tensor = _OPERATOR(list(parts.values()), ",".join(parts), fmt, list(shape), dtype)
    return found
