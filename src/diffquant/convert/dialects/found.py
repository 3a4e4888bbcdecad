"""What finders share: what they return, and how they read markers and check scales."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.floats import PLAIN_FLOATS, float32_of
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = [
    "TORCH_CAST",
    "Bound",
    "Finder",
    "check_scale",
    "input_scales",
    "kept_beside",
    "read_json",
    "short_scale",
]

MARKER_LIMIT = 4096  # bytes of a marker tensor that a finder is willing to read
TORCH_CAST = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Bound:
    """One weight as a finder understands it.

    Attributes:
        tensor: the weight.
        used: physical keys beside the weight that belong to it.
        warnings: what looked wrong but could be read, each behind the key and a colon.
        set_aside: (key, reason) of what is beside the weight and goes nowhere.
    """

    tensor: LogicalTensor
    used: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    set_aside: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Finder:
    """A dialect's view of one source: made once from its header and markers.

    A finder is made of a source and of `names`, the last segments of its keys (weight, SCB ...).

    Attributes:
        find: the spec of a tensor -> what it is with its companions, None where the tensor is not
            of this dialect. None instead of a function: no tensor of this source is.
        consumed: keys that mark the file as a whole.
        warnings: what looked wrong of the file as a whole.
        dialect: what its weights are said to be written in.
    """

    find: Callable[[TensorSpec], Bound | None] | None
    consumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dialect: str = "plain"


def check_scale(source: TensorSource, scale: str, weight: TensorSpec) -> tuple[str, ...]:
    """Refuse a scale that is not one float or one per row; warn of 16-bit ones.

    Raises:
        MalformedFile: it is something else.
    """
    found = source.specs[scale]
    if found.dtype not in PLAIN_FLOATS or found.size not in (1, weight.rows):
        raise MalformedFile(
            f"{scale}: expected F32 with 1 or {weight.rows} values, found {found.dtype} "
            f"{found.shape}",
            path=source.path,
        )
    return short_scale(found)


def short_scale(scale: TensorSpec) -> tuple[str, ...]:
    """Warn of a scale of 16 bits."""
    if scale.dtype == "F32":
        return ()
    return (
        f"{scale.key}: the scale is {scale.dtype}, which ComfyUI stops at (scale must be f32); it "
        "is read, and written as F32",
    )


def input_scales(specs: Mapping[str, TensorSpec], layer: str) -> tuple[str, ...]:
    """Scales of a layer's input, in both spellings."""
    return tuple(k for k in (f"{layer}.scale_input", f"{layer}.input_scale") if k in specs)


def kept_beside(
    source: TensorSource, layer: str
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """The scale of a layer's input, to be copied with the weight; or why it is set aside.

    The older spelling with a value of 1 means none: Comfy-Org/ComfyUI@09708ea:comfy/utils.py
    convert_old_quants drops it.
    """
    keys = input_scales(source.specs, layer)
    aside = []
    for key in keys:
        spec = source.specs[key]
        if spec.dtype not in PLAIN_FLOATS or spec.size != 1:
            aside.append((key, f"no scale of an input: {spec.dtype} {spec.shape}"))
        elif key.endswith(".scale_input") and _is_one(source, spec):
            aside.append((key, "scale of the layer's input is 1.0, which means none"))
        else:
            aside += [(other, "a second scale of one input") for other in keys if other > key]
            return {"input_scale": key}, tuple(aside)
    return {}, tuple(aside)


def _is_one(source: TensorSource, spec: TensorSpec) -> bool:
    return float(float32_of(source.read(spec.key), spec.dtype)[0]) == 1.0


def read_json(source: TensorSource, key: str) -> Mapping[str, Any]:
    """Read a marker tensor.

    Raises:
        MalformedFile: it is too large, or no JSON object.
    """
    spec = source.specs[key]
    if spec.dtype != "U8" or spec.nbytes > MARKER_LIMIT:
        raise MalformedFile(
            f"{key}: expected at most {MARKER_LIMIT} bytes of JSON, found {spec.dtype} "
            f"{spec.shape}",
            path=source.path,
        )
    try:
        value = json.loads(bytes(source.read(key)).rstrip(b"\0 "))
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{key}: not JSON", path=source.path) from error
    if not isinstance(value, dict):
        raise MalformedFile(f"{key}: expected a JSON object", path=source.path)
    return value
