"""From a file's tensors to packed weights: bytes leave the mapped file once, nothing is unpacked.

Canonical keys may be fused of several tensors of the file, or be some rows of one: each piece
becomes a segment of its own, in the format it is stored in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from diffquant.convert.architectures.base import Layout
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.match import PartMatch, to_layout
from diffquant.convert.rules import Assignment
from diffquant.core.heap import give_back_freed_blocks
from diffquant.core.tensors import ByteArray
from diffquant.quant.formats import FORMATS
from diffquant.runtime.layers import PackedWeight, Segment

__all__ = ["packed_weights"]

_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # an exponent, which the kernels look up
    "I8": torch.int8,
    "U8": torch.uint8,
}


def packed_weights(
    logical: LogicalSource,
    part: PartMatch,
    layout: Layout = "canonical",
    reads: Callable[[str], bool] = lambda _: True,
) -> dict[str, PackedWeight]:
    """Load a part's weights by the keys of `layout`, packed as they are stored.

    Those whose key `reads` turns down are left in the file.
    On Linux this also tells the C library, for the whole process, to give large freed blocks back.
    """
    give_back_freed_blocks()  # a decoded layer must not stay part of the process
    return {
        assignment.target: PackedWeight(_segments(logical, assignment))
        for assignment in to_layout(part, layout)
        if reads(assignment.target)
    }


def _segments(logical: LogicalSource, assignment: Assignment) -> tuple[Segment, ...]:
    """One segment per piece, so that fused weights need no common format.

    A piece that is only some rows of a packed weight, or a type the kernels lack, is decoded.
    """
    tail = assignment.shape[1:]
    segments = []
    for piece in assignment.pieces:
        tensor = logical.tensors[piece.key]
        rows = tensor.shape[0] if tensor.shape else 1
        whole = (piece.start, piece.stop) == (0, rows)
        shape = (piece.stop - piece.start, *tail) if assignment.shape else ()
        known = bool(tensor.format) and not assignment.transpose
        if tensor.reshaped and known:  # rows of 256 that are no whole rows of the weight
            known = not FORMATS[tensor.format].check(tensor.shape)
        if known and (whole or FORMATS[tensor.format].is_cast):
            segments.append(_packed(logical, tensor, shape, (piece.start, piece.stop)))
        else:
            values = logical.read(piece.key)
            flat = values.reshape(rows, -1)[piece.start : piece.stop]
            flat = flat.T if assignment.transpose else flat
            plain = torch.from_numpy(np.array(flat, dtype=np.float32)).reshape(
                assignment.shape if assignment.transpose else shape
            )
            segments.append(Segment("f32", tuple(plain.shape), {"weight": plain}))
    return tuple(segments)


def _packed(
    logical: LogicalSource, tensor: LogicalTensor, shape: tuple[int, ...], rows: tuple[int, int]
) -> Segment:
    parts = {}
    for name, key in tensor.parts.items():
        spec = logical.source.specs[key]
        data = logical.source.read(key)
        if FORMATS[tensor.format].is_cast and spec.size:
            per = spec.nbytes // (tensor.shape[0] if tensor.shape else 1)
            data = data[rows[0] * per : rows[1] * per]
        parts[name] = _as_torch(data, spec.dtype, name, tensor, shape)
    for name, value in tensor.constants.items():
        parts[name] = torch.tensor(value, dtype=torch.float32)
    return Segment(tensor.format, shape, parts)


def _as_torch(
    data: ByteArray, dtype: str, name: str, tensor: LogicalTensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Copy bytes off the map into a tensor of the stored dtype, in the part's own shape."""
    owned = torch.from_numpy(np.array(data, dtype=np.uint8))
    if dtype not in _TORCH:  # ggml blocks stay bytes: (N, bytes per row)
        return owned.reshape(shape[0], -1)
    typed = owned.view(_TORCH[dtype])
    row = FORMATS[tensor.format]
    if row.is_tiled:
        part = next(one for one in row.parts if one.name == name)
        typed = typed.float() if part.dtype == "F32" else typed  # 16 bits in some files
        return typed.reshape(part.shape(shape))
    if name == "weight":
        return typed.reshape(-1) if row.flat_block else typed.reshape(_matrix(tensor, shape))
    if name == "scale":
        typed = typed.float()  # some files hold scales of 16 bits
        return typed.reshape(()) if typed.numel() == 1 else typed.reshape(-1, 1)
    return typed.reshape(-1)


def _matrix(tensor: LogicalTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if FORMATS[tensor.format].is_cast or len(shape) < 2:
        return shape
    return shape[0], -1
