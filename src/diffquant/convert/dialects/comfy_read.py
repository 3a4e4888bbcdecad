"""Find ComfyUI's layers again: from marker tensors, or from `_quantization_metadata`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from diffquant.convert.dialects.comfy import COMFY_FORMATS, GROUP_SIZES
from diffquant.convert.dialects.found import Bound, Finder, check_scale, read_json
from diffquant.convert.dialects.padded import bind_padded
from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.formats import format_named

__all__ = ["comfy_finder"]

_NAMES = {name: fmt for fmt, (name, _) in COMFY_FORMATS.items()}


def comfy_finder(source: TensorSource) -> Finder:
    """Make the finder of a source."""
    return Finder(functools.partial(_find, source, _markers(source)), dialect="comfy")


def _find(
    source: TensorSource, markers: Mapping[str, Mapping[str, Any]], spec: TensorSpec
) -> Bound | None:
    layer = spec.key.removesuffix(".weight") if spec.key.endswith(".weight") else ""
    if not layer or layer not in markers:
        return None
    tensor, used = _bind(source, spec.key, layer, markers[layer])
    return Bound(tensor, used)


def _bind(
    source: TensorSource, key: str, layer: str, marker: Mapping[str, Any]
) -> tuple[LogicalTensor, tuple[str, ...]]:
    specs = source.specs
    spec = specs[key]
    name = _NAMES.get(str(marker.get("format")), "")
    endings = COMFY_FORMATS[name][1] if name else {"scale": "weight_scale"}
    parts = {part: f"{layer}.{ending}" for part, ending in endings.items()}
    beside = (f"{layer}.comfy_quant", *parts.values(), f"{layer}.input_scale")
    used = tuple(k for k in beside if k in specs)
    lacking = any(k not in specs for k in parts.values())
    smoothed = f"{layer}.pre_quant_scale" in specs  # the input is to be multiplied, and is not here
    other_blocks = name in GROUP_SIZES and marker.get("group_size") != GROUP_SIZES[name]
    if not name or marker.get("convrot") or lacking or smoothed or other_blocks:
        ours = (f"{layer}.weight_", f"{layer}.pre_quant_scale")
        others = tuple(k for k in specs if k.startswith(ours) and k not in used)
        beside_it = " with pre_quant_scale" if smoothed else ""
        why = f"comfy_quant {json.dumps(dict(marker))}{beside_it} is not supported yet"
        return LogicalTensor(key, spec.shape, "", {"weight": key}, spec.dtype, why), used + others
    row = format_named(name)
    stored = row.parts[0].dtype
    if spec.dtype != stored or len(spec.shape) < 2:
        raise MalformedFile(
            f"{key}: {marker['format']} needs {stored} with 2 or more dimensions, found "
            f"{spec.dtype} {spec.shape}",
            path=source.path,
        )
    shape = spec.shape
    if row.is_tiled:
        shape = bind_padded(source, name, {"weight": key, **parts}, layer, marker)
    else:
        check_scale(source, parts["scale"], spec)
        if name.startswith("int8") and not _is_per_row(specs[parts["scale"]]):
            name = "int8_tensor"  # one name for both: the scale's shape tells
    return LogicalTensor(key, shape, name, {"weight": key, **parts}, spec.dtype), used


def _is_per_row(scale: TensorSpec) -> bool:
    return scale.size > 1 or len(scale.shape) == 2


def _markers(source: TensorSource) -> dict[str, Mapping[str, Any]]:
    """Layer -> its comfy_quant object, from marker tensors and from the header."""
    found: dict[str, Mapping[str, Any]] = {}
    header = source.metadata.get("_quantization_metadata")
    if isinstance(header, str):
        try:
            layers = json.loads(header).get("layers", {})
            found.update({k: v for k, v in layers.items() if isinstance(v, dict)})
        except (ValueError, AttributeError, RecursionError) as error:
            raise MalformedFile(
                "_quantization_metadata in the header is not JSON with layers", path=source.path
            ) from error
    for key in source.specs:
        if key.endswith(".comfy_quant"):
            found[key.removesuffix(".comfy_quant")] = read_json(source, key)
    return found
