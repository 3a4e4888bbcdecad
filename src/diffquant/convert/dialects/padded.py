"""Shapes of packed weights that may be padded: what a file says, checked against its sizes.

A padded shape is rounded up to whole blocks, and the weight's own is the model's affair
(comfy_kitchen 0.2.40 tensor/base.py, orig_shape). convert/tiled.py reads such weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffquant.convert.dialects.comfy import ORIGINAL_SHAPE
from diffquant.core.errors import MalformedFile
from diffquant.core.floats import PLAIN_FLOATS
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.formats import QuantFormat, format_named

__all__ = ["bind_padded"]

_BYTES = frozenset({"U8", "F8_E8M0", "F8_E4M3"})  # a scale's byte, whatever its dtype is called


def bind_padded(
    source: TensorSource,
    fmt: str,
    keys: Mapping[str, str],
    layer: str,
    marker: Mapping[str, Any],
) -> tuple[int, ...]:
    """Find a weight's own shape, and check the sizes of its parts before anything is read.

    The shape is that of the marker, where we wrote the file; else rows are the bias's and columns
    as stored, which is right wherever the model's are whole blocks.

    Args:
        source: the file.
        fmt: FORMATS name.
        keys: part name -> key.
        layer: key of the layer.
        marker: its comfy_quant object.

    Raises:
        MalformedFile: a part's size does not follow from that shape.
    """
    row, spec = format_named(fmt), source.specs[keys["weight"]]
    if len(spec.shape) != 2:
        raise MalformedFile(
            f"{spec.key}: {fmt} needs 2 dimensions, found {spec.shape}", path=source.path
        )
    shape = _own_shape(source, row, spec, layer, marker.get(ORIGINAL_SHAPE))
    for part in row.parts:
        found, wanted = source.specs[keys[part.name]], part.shape(shape)
        same = found.dtype == part.dtype or {found.dtype, part.dtype} <= _BYTES
        same = same or (part.dtype == "F32" and found.dtype in PLAIN_FLOATS)  # 16 bits: read, named
        rows_fit = not part.per_row or found.shape[:1] == wanted[:1]
        if not same or not rows_fit or found.size != math.prod(wanted):
            raise MalformedFile(
                f"{found.key}: expected {part.dtype} {wanted} for a {fmt} weight of {shape}, found "
                f"{found.dtype} {found.shape}",
                path=source.path,
            )
    return shape


def _own_shape(
    source: TensorSource,
    row: QuantFormat,
    spec: TensorSpec,
    layer: str,
    given: Any,  # noqa: ANN401 - JSON of a file
) -> tuple[int, ...]:
    if given is not None:
        fits = isinstance(given, list) and len(given) == 2
        fits = fits and all(type(length) is int and length > 0 for length in given)
        if not fits or row.parts[0].shape(tuple(given)) != spec.shape:
            raise MalformedFile(
                f"{spec.key}: stored as {spec.shape}, which is not the padding of "
                f"{ORIGINAL_SHAPE} {given!r:.80}",
                path=source.path,
            )
        return tuple(given)
    per_byte = row.padding // row.parts[0].shape((row.padding, row.padding))[1]
    rows, columns = spec.shape[0], spec.shape[1] * per_byte
    bias = source.specs.get(f"{layer}.bias")
    if bias is not None and rows - row.padding < bias.size <= rows:
        rows = bias.size
    return rows, columns
