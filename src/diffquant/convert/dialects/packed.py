"""What a dialect writes for one encoded weight: a few named tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass

from diffquant.core.errors import PolicyError
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import format_named

__all__ = ["Packed", "Shape", "json_tensor", "layer_of", "plain"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor a dialect writes.

    Attributes:
        spec: as stored.
        part: the FORMATS part whose bytes it holds, or "" for constant bytes.
        constant: the bytes, when `part` is empty.
    """

    spec: TensorSpec
    part: str
    constant: bytes = b""


def plain(key: str, fmt: str, shape: Shape, _dtype: str) -> tuple[Packed, ...]:
    """The numbers under the weight's own key, and nothing beside them."""
    part = format_named(fmt).parts[0]
    return (Packed(TensorSpec(key, part.dtype, part.shape(shape)), part.name),)


def layer_of(key: str, dialect: str) -> str:
    """Key of the layer that a weight belongs to.

    Raises:
        PolicyError: the key is no layer's weight.
    """
    if not key.endswith(".weight"):
        raise PolicyError(f"{key}: the {dialect} dialect packs layer weights only")
    return key.removesuffix(".weight")


def json_tensor(key: str, value: object) -> Packed:
    """A marker: JSON text as a uint8 tensor."""
    data = json.dumps(value).encode()
    return Packed(TensorSpec(key, "U8", (len(data),)), "", data)
