"""What a dialect writes for one encoded weight: a few named tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import PolicyError
from diffquant.core.tensors import ByteArray, TensorSpec
from diffquant.quant.formats import format_named

__all__ = ["Packed", "Shape", "json_tensor", "json_with_value", "layer_of", "plain"]

Shape = tuple[int, ...]
_FLOAT_WIDTH = 24  # of the longest repr of a float


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor a dialect writes.

    Attributes:
        spec: as stored.
        part: the FORMATS part whose bytes it holds, or "" for constant bytes.
        constant: the bytes, when `part` is empty; with a part, the text that its value is put
            behind (`json_with_value`).
    """

    spec: TensorSpec
    part: str
    constant: bytes = b""

    def data(self, value: NDArray[Any] | np.float32 | None) -> ByteArray:
        """The bytes to write: those of the part's value, or the constant ones."""
        if value is None:
            return np.frombuffer(self.constant, np.uint8)
        if self.constant:
            text = self.constant + repr(float(value)).encode() + b"}"
            return np.frombuffer(text.ljust(self.spec.nbytes), np.uint8)
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


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


def json_with_value(key: str, value: Mapping[str, object], name: str, part: str) -> Packed:
    """A marker whose last field is only known when the weight has been encoded.

    Its text is as long as any float needs, filled up with spaces, so that the size of the file
    does not depend on the data.
    """
    head = f'{json.dumps(value)[:-1]}, "{name}": '.encode()
    return Packed(TensorSpec(key, "U8", (len(head) + _FLOAT_WIDTH + 1,)), part, head)
