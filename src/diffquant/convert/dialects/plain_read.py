"""Tensors that are all there is to a weight: casts, ggml blocks, integers, foreign types.

ComfyUI-GGUF stores some tensors as rows of 256 and keeps their own shape in the header.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Set
from dataclasses import replace

from diffquant.convert.dialects.found import Bound, Finder
from diffquant.convert.logical import ORIG_SHAPE, LogicalTensor
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.io.gguf_values import GgufArray
from diffquant.quant.formats import FORMATS

__all__ = ["plain_finder"]

# Block types without a row in FORMATS: ggml's for activations, and a later one.
_UNREAD = ("Q8_1", "Q8_K", "Q1_0")
_FLOATS = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "F8_E4M3": "fp8_e4m3",
    "F8_E5M2": "fp8_e5m2",
}


def plain_finder(source: TensorSource, _names: Set[str]) -> Finder:
    """Make the finder of a source; it knows every tensor."""
    return Finder(functools.partial(_find, _original_shapes(source)))


def _find(shapes: Mapping[str, tuple[int, ...]], spec: TensorSpec) -> Bound:
    name, why = _FLOATS.get(spec.dtype, ""), ""
    if not name:
        if STORAGE[spec.dtype].is_block and spec.dtype.lower() in FORMATS:
            name = spec.dtype.lower()
        elif spec.dtype in _UNREAD:
            why = f"blocks of {spec.dtype} are not supported"
    tensor = LogicalTensor(spec.key, spec.shape, name, {"weight": spec.key}, spec.dtype, why)
    if shapes and shapes.get(spec.key, spec.shape) != spec.shape:
        tensor = replace(tensor, shape=shapes[spec.key], reshaped=spec.shape)
    return Bound(tensor)


def _original_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Shapes from before a writer stored tensors as rows of 256, by tensor name.

    Source: city96/ComfyUI-GGUF@795e451:loader.py:16-24 (an array of INT32 or an error).
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, value in source.metadata.items():
        if source.container != "gguf" or not name.startswith(ORIG_SHAPE):
            continue
        spec = source.specs.get(name.removeprefix(ORIG_SHAPE))
        if spec is None:
            continue  # of a tensor that was split off since: it says nothing about the others
        usable = isinstance(value, GgufArray) and value.type == "i32" and 0 < len(value) <= 8
        shape = tuple(value) if usable else ()
        if not usable or min(shape) < 1 or math.prod(shape) != spec.size:
            raise MalformedFile(
                f"{name}: expected an INT32 array whose product is {spec.size}, the size of the "
                f"tensor, found {value!r:.80}",
                path=source.path,
            )
        found[spec.key] = shape
    return found
