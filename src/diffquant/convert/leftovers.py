"""Steps for tensors that belong to no part of a model: copied, or written as a marker."""

from __future__ import annotations

from diffquant.convert.dialects import Packed, pack
from diffquant.convert.logical import LogicalSource
from diffquant.convert.rules import Assignment, Piece
from diffquant.convert.step import Step
from diffquant.core.dtypes import STORAGE
from diffquant.core.tensors import TensorSpec
from diffquant.quant.policy import Decision

__all__ = ["copy_step", "is_plain", "marker_step"]


def is_plain(logical: LogicalSource, key: str) -> bool:
    """Whether one tensor is all there is to a weight, in a dtype that safetensors has."""
    tensor = logical.tensors[key]
    alone = len(tensor.parts) == 1 and not tensor.why
    return alone and STORAGE[tensor.dtype].safetensors


def marker_step(logical: LogicalSource, key: str) -> Step:
    """A step for a GGUF file that writes a tensor of no part, by which loaders tell a variant."""
    tensor = logical.tensors[key]
    shape = tensor.shape or (1,)
    assignment = Assignment(key, tensor.shape, (Piece(key, 0, shape[0]),))
    decision = Decision("f32", "marker by which loaders tell the variant: f32")
    packed = pack("gguf", key, "f32", shape, "f32")
    return Step("", key, key, assignment, decision, "f32", packed, packed[0].spec.nbytes)


def copy_step(logical: LogicalSource, key: str, reason: str) -> Step:
    """A step that copies a tensor of no part, under its own name."""
    tensor = logical.tensors[key]
    rows = tensor.shape[0] if tensor.shape else 1
    assignment = Assignment(key, tensor.shape, (Piece(key, 0, rows),))
    packed = (Packed(TensorSpec(key, tensor.dtype, tensor.shape), "weight"),)
    decision = Decision("", f"{reason}: copied")
    nbytes = packed[0].spec.nbytes
    return Step("", key, key, assignment, decision, tensor.dtype.lower(), packed, nbytes)
