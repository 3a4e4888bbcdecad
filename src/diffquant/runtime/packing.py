"""From a file's tensors to packed weights: bytes are read as they are stored, nothing is unpacked.

Canonical keys may be fused of several tensors of the file, or be some rows of one: each piece
becomes a segment of its own, in the format it is stored in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffquant.convert.architectures.base import Layout
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.match import PartMatch, to_layout
from diffquant.convert.rules import Assignment, Piece
from diffquant.core.heap import give_back_freed_blocks
from diffquant.core.tensors import ByteArray, TensorSpec
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import ROWWISE
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.stored import StoredPart, StoredSegment, StoredWeight, rows_of

__all__ = ["packed_weights", "stored_weights"]

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
    """Load a part's weights by the keys of `layout`, packed as they are stored; see below."""
    stored = stored_weights(logical, part, layout, reads)
    return {key: weight.load() for key, weight in stored.items()}


def stored_weights(
    logical: LogicalSource,
    part: PartMatch,
    layout: Layout = "canonical",
    reads: Callable[[str], bool] = lambda _: True,
) -> dict[str, StoredWeight]:
    """A part's weights by the keys of `layout`, each to be loaded while the source is open.

    Those whose key `reads` turns down are left out.
    On Linux this also tells the C library, for the whole process, to give large freed blocks back.
    """
    give_back_freed_blocks()  # a decoded layer must not stay part of the process
    return {
        assignment.target: StoredWeight.of(_segments(logical, assignment))
        for assignment in to_layout(part, layout)
        if reads(assignment.target)
    }


def _segments(logical: LogicalSource, assignment: Assignment) -> list[StoredSegment]:
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
            into = assignment.shape if assignment.transpose else shape
            decode = functools.partial(_decoded, logical, piece, rows, into, assignment.transpose)
            outline = torch.empty(into, dtype=torch.float32, device="meta")
            segments.append(StoredSegment("f32", into, {"weight": StoredPart(outline, decode)}))
    return segments


def _decoded(
    logical: LogicalSource, piece: Piece, rows: int, shape: tuple[int, ...], transpose: bool
) -> Tensor:
    """A piece in float32: some rows of a packed weight, or all of one that has to be turned."""
    flat = logical.read(piece.key).reshape(rows, -1)[piece.start : piece.stop]
    flat = flat.T if transpose else flat
    return torch.from_numpy(np.array(flat, dtype=np.float32)).reshape(shape)


def _packed(
    logical: LogicalSource, tensor: LogicalTensor, shape: tuple[int, ...], rows: tuple[int, int]
) -> StoredSegment:
    parts = {}
    for name, key in tensor.parts.items():
        spec = logical.source.specs[key]
        cut = (0, spec.nbytes)
        if FORMATS[tensor.format].is_cast and spec.size:
            per = spec.nbytes // (tensor.shape[0] if tensor.shape else 1)
            cut = (rows[0] * per, rows[1] * per)
        like = functools.partial(_as_torch, spec.dtype, name, tensor, shape)
        outline = like(torch.empty(cut[1] - cut[0], dtype=torch.uint8, device="meta"))
        whole = cut == (0, spec.nbytes)
        parts[name] = StoredPart(
            outline,
            functools.partial(_read, logical, spec, cut, like),
            functools.partial(_read_rows, logical, spec, outline)
            if whole and tensor.format in ROWWISE and spec.rows == shape[0] and outline.ndim > 1
            else None,
        )
    for name, value in tensor.constants.items():
        constant = torch.tensor(value, dtype=torch.float32)
        parts[name] = StoredPart(constant.to("meta"), functools.partial(_same, constant))
    return StoredSegment(tensor.format, shape, parts)


def _same(constant: Tensor) -> Tensor:
    return constant


def _read(
    logical: LogicalSource,
    spec: TensorSpec,
    cut: tuple[int, int],
    like: Callable[[Tensor], Tensor],
) -> Tensor:
    return like(_owned(logical.source.read(spec.key))[cut[0] : cut[1]])


def _read_rows(
    logical: LogicalSource, spec: TensorSpec, outline: Tensor, wanted: Sequence[int]
) -> Tensor:
    def read(start: int, stop: int) -> Tensor:
        flat = _owned(logical.source.read(spec.key, (start, stop)))
        typed = flat if spec.dtype not in _TORCH else flat.view(_TORCH[spec.dtype])
        return typed.to(outline.dtype).reshape(stop - start, *outline.shape[1:])

    return rows_of(read, wanted)


def _owned(data: ByteArray) -> Tensor:
    """Bytes that were read, as a tensor: copied only where they are somebody else's."""
    if not data.flags.owndata:
        data = np.array(data, dtype=np.uint8)
    data.flags.writeable = True  # torch warns of read-only memory; nobody writes to weights
    return torch.from_numpy(data)


def _as_torch(
    dtype: str, name: str, tensor: LogicalTensor, shape: tuple[int, ...], flat: Tensor
) -> Tensor:
    """Flat bytes of a part as a tensor of the stored dtype, in the part's own shape."""
    if dtype not in _TORCH:  # ggml blocks stay bytes: (N, bytes per row)
        return flat.reshape(shape[0], -1)
    typed = flat.view(_TORCH[dtype])
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
