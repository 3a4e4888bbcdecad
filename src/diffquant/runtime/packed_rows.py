"""Packed weights as matrices of 8-bit rows: which formats are that already, and making others so.

The numbers are those of kernels/rows.py; who multiplies so is low_bit.py's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import products
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.rows import KINDS, QuantizedRows
from diffquant.runtime.layers import Activations, PackedWeight, Segment

__all__ = ["STORED", "Stored", "is_stored", "multiply", "requantized", "rotation_of", "unrotated"]


@dataclass(frozen=True, slots=True)
class Stored:
    """How a number format is a matrix of 8-bit rows already.

    Attributes:
        kind: a key of KINDS.
        scale: the part with its scales; "": they are all 1.
        rotation: groups in which activations have to be rotated, 0: none.
        packed: whether its levels are unpacked from 4 bits for every call.
    """

    kind: str
    scale: str = "scale"
    rotation: int = 0
    packed: bool = False


def _rotated() -> Iterator[tuple[str, Stored]]:
    scales = {"int8_convrot": "scale", "convrot_w4a4": "scale", "asym_w4a8_int8": "s_channel"}
    for row in FORMATS.values():
        if row.codec in scales:
            packed = row.codec != "int8_convrot"
            yield row.name, Stored("int8", scales[row.codec], row.rotation, packed)


STORED: Mapping[str, Stored] = {
    "fp8_e4m3": Stored("fp8", ""),
    "fp8_e4m3_scaled": Stored("fp8"),
    "fp8_e4m3_rowwise": Stored("fp8"),
    "int8_tensor": Stored("int8"),
    "int8_rowwise": Stored("int8"),
    **dict(_rotated()),
}


def is_stored(weight: PackedWeight, kind: str) -> bool:
    """Whether every segment is a matrix of 8-bit rows of this kind."""
    return all(name in STORED and STORED[name].kind == kind for name in weight.formats)


def requantized(weight: PackedWeight, kind: str) -> PackedWeight:
    """The weight in 8 bits, one scale per row; segments that are so already stay as they are.

    Several that come out alike become one: a fused q, k and v is one product then.
    """

    def again(one: Segment) -> Segment:
        if one.format in STORED and STORED[one.format].kind == kind:
            return one
        rows = one.dequantize(torch.float32).reshape(one.shape[0], -1)
        q, scale = products.quantize_rows(rows, kind)
        return Segment(KINDS[kind].rowwise, (*rows.shape,), {"weight": q, "scale": scale})

    segments = tuple(again(one) for one in weight.segments)
    if len(segments) == 1 or {one.format for one in segments} != {KINDS[kind].rowwise}:
        return PackedWeight(segments)
    parts = {name: torch.cat([one.parts[name] for one in segments]) for name in ("weight", "scale")}
    shape = (sum(one.shape[0] for one in segments), *segments[0].shape[1:])
    return PackedWeight((Segment(KINDS[kind].rowwise, shape, parts),))


def rotation_of(weight: PackedWeight) -> int | None:
    """In groups of how many activations are rotated for a weight that is stored; None: mixed."""
    found = {STORED[name].rotation for name in weight.formats}
    return found.pop() if len(found) == 1 else None


def unrotated(one: Segment) -> tuple[str, Parts, int]:
    """A segment as few rows are multiplied with it: format, parts, rotation of the activations.

    A rotated weight of 8 bits is one without rotation once activations are rotated.
    """
    row = STORED.get(one.format)
    if row is None or not row.rotation or row.packed:
        return one.format, one.parts, 0
    parts = {"weight": one.parts["weight"], "scale": one.parts[row.scale]}
    return KINDS[row.kind].rowwise, parts, row.rotation


def multiply(x: Activations, weight: PackedWeight, bias: Tensor | None, kind: str) -> Tensor:
    """`x W^T + bias` in 8 bits: (..., K) to (..., N) in the dtype of `x`.

    Args:
        x: activations, or rows of them that were quantized as every segment wants them.
        weight: of segments that are stored in `kind`.
        bias: (N,) or None.
        kind: a key of KINDS.
    """
    quantized: dict[int, tuple[Tensor, Tensor]] = {}
    if isinstance(x, QuantizedRows):
        quantized[x.kind.rotation] = x.q, x.scale
    outputs, first = [], 0
    for one in weight.segments:
        row, shape = STORED[one.format], (one.shape[0], x.shape[-1])
        if row.rotation not in quantized:
            assert isinstance(x, Tensor)
            rows = x.reshape(-1, x.shape[-1])
            quantized[row.rotation] = products.quantize_rows(rows, kind, rotation=row.rotation)
        if row.packed:
            matrix = products.levels(one.format, one.parts, shape)
        else:
            matrix = one.parts["weight"].reshape(shape)
        given, given_scale = quantized[row.rotation]
        scale = one.parts[row.scale].float() if row.scale else given_scale.new_ones(())
        some = None if bias is None else bias[first : first + shape[0]]
        outputs.append(products.multiply_rows(given, given_scale, matrix, scale, some, x.dtype))
        first += shape[0]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y.reshape(*x.shape[:-1], first)
