"""Find ComfyUI's layers again: from marker tensors, or from `_quantization_metadata`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from diffquant.convert.dialects.comfy import COMFY_FORMATS
from diffquant.convert.dialects.comfy_foreign import foreign_layer
from diffquant.convert.dialects.found import (
    Bound,
    Finder,
    check_scale,
    input_scales,
    kept_beside,
    short_scale,
)
from diffquant.convert.dialects.markers import HEADER, Marker, read_markers
from diffquant.convert.dialects.padded import bind_padded
from diffquant.convert.logical import LogicalTensor
from diffquant.core.dtypes import storage_nbytes
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.formats import FORMATS, format_named

__all__ = ["comfy_finder"]

# What a marker means where it does not say so: comfy/ops.py, comfy_kitchen 0.2.40 tensor/*.py.
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "int8_tensorwise": {"convrot": False, "convrot_groupsize": 256},
    "convrot_w4a4": {"convrot_groupsize": 256},
    "asym_w4a8_int8": {"group_size": 16, "convrot_groupsize": 256},
}

_NOTES = ("full_precision_matrix_mult",)  # of the marker: how a layer is used, whatever it holds


def comfy_finder(source: TensorSource, names: Set[str]) -> Finder:
    """Make the finder of a source."""
    if "comfy_quant" not in names and HEADER not in source.metadata:
        return Finder(None, dialect="comfy")
    markers, warnings = read_markers(source)
    find = functools.partial(_find, source, markers) if markers else None
    return Finder(find, warnings=warnings, dialect="comfy")


def _find(source: TensorSource, markers: Mapping[str, Marker], spec: TensorSpec) -> Bound | None:
    layer = spec.key.removesuffix(".weight") if spec.key.endswith(".weight") else ""
    marker = markers.get(layer) if layer else None
    if marker is None:
        return None
    bound = _bind(source, spec, layer, marker)
    beside, aside = kept_beside(source, layer)
    tensor = replace(
        bound.tensor,
        called=marker.format,
        marked=marker.where,
        beside=beside,
        notes={key: marker.fields[key] for key in _NOTES if marker.fields.get(key) is True},
    )
    return Bound(tensor, bound.used, (*marker.warnings, *bound.warnings), aside)


def _bind(source: TensorSource, spec: TensorSpec, layer: str, marker: Marker) -> Bound:
    specs = source.specs
    name = _format_of(marker)
    endings = COMFY_FORMATS[name].endings if name else {"scale": "weight_scale"}
    parts = {part: f"{layer}.{ending}" for part, ending in endings.items()}
    parts, spelled = _spelled(specs, layer, parts)
    beside = (f"{layer}.comfy_quant", *parts.values(), *input_scales(specs, layer))
    used = tuple(k for k in beside if k in specs)
    lacking = any(k not in specs for k in parts.values())
    # The input is to be multiplied, and is not here; a correction is added to what is decoded.
    strange = [
        f"{layer}.{one}"
        for one in ("pre_quant_scale", "weight_correction")
        if f"{layer}.{one}" in specs
    ]
    if not name or lacking or strange:
        others = tuple(
            k
            for k in specs
            if k.startswith((f"{layer}.weight_", f"{layer}.pre_quant_scale")) and k not in used
        )
        foreign = None if strange else foreign_layer(source, spec, layer, marker)
        if foreign is not None:
            return Bound(foreign, used + others)
        beside_it = f" with {strange[0].rpartition('.')[2]}" if strange else ""
        why = f"comfy_quant {json.dumps(dict(marker.fields))}{beside_it} is not supported"
        tensor = LogicalTensor(spec.key, spec.shape, "", {"weight": spec.key}, spec.dtype, why)
        return Bound(tensor, used + others)
    _check_weight(source, spec, name, marker)
    shape = spec.shape
    warnings: tuple[str, ...] = ()
    row = format_named(name)
    if row.is_tiled:
        shape = bind_padded(source, name, {"weight": spec.key, **parts}, layer, marker.fields)
        warnings = tuple(
            line for part in row.parts if part.dtype == "F32"
            for line in short_scale(specs[parts[part.name]])
        )  # fmt: skip
    elif set(parts) == {"scale"}:
        warnings = check_scale(source, parts["scale"], spec)
        if name == "int8_rowwise" and not _is_per_row(specs[parts["scale"]]):
            name = "int8_tensor"  # one name for both: the scale's shape tells
        if row.parts[0].shape((1, 2)) != (1, 2):
            shape = (spec.shape[0], spec.shape[1] * 2)
    else:
        shape = (spec.shape[0], spec.shape[1] * 2)
        _check_parts(source, name, {"weight": spec.key, **parts}, shape)
    if failed := format_named(name).check(shape):
        raise MalformedFile(
            f"{spec.key}: {marker.format} needs {' and '.join(failed)}, found {shape}",
            path=source.path,
        )
    tensor = LogicalTensor(spec.key, shape, name, {"weight": spec.key, **parts}, spec.dtype)
    return Bound(tensor, used, warnings + spelled)


def _spelled(
    specs: Mapping[str, TensorSpec], layer: str, parts: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The parts' keys, where the scale has its older name."""
    old = f"{layer}.scale_weight"
    if parts.get("scale") != f"{layer}.weight_scale" or parts["scale"] in specs or old not in specs:
        return dict(parts), ()
    return {**parts, "scale": old}, (
        f"{layer}: its scale is called scale_weight, while ComfyUI looks for weight_scale beside "
        "what a marker or the header names; it is applied",
    )


def _format_of(marker: Marker) -> str:
    """The FORMATS row with the marker's name and fields; "" where there is none."""
    said: dict[str, Any] = {**_DEFAULTS.get(marker.format, {}), **marker.fields}
    rows = [(key, row) for key, row in COMFY_FORMATS.items() if row.name == marker.format]
    if said.get("convrot") is False:  # the size means nothing without a rotation
        rows = [(key, row) for key, row in rows if not FORMATS[key].rotation]
    elif "convrot" in said:
        rows = [(key, row) for key, row in rows if FORMATS[key].rotation]
    fits = (
        key
        for key, row in rows
        if all(
            said.get(name) == value and type(said.get(name)) is type(value)
            for name, value in row.fields.items()
        )
    )
    found = next(fits, "")
    return "int8_rowwise" if found == "int8_tensor" else found


def _check_weight(source: TensorSource, spec: TensorSpec, name: str, marker: Marker) -> None:
    stored = format_named(name).parts[0].dtype
    if spec.dtype != stored or len(spec.shape) < 2:
        raise MalformedFile(
            f"{spec.key}: {marker.format} needs {stored} with 2 or more dimensions, found "
            f"{spec.dtype} {spec.shape}",
            path=source.path,
        )


def _check_parts(
    source: TensorSource, name: str, keys: Mapping[str, str], shape: tuple[int, ...]
) -> None:
    """Parts other than one scale: sizes follow from the weight's shape."""
    for part in format_named(name).parts:
        found, wanted = source.specs[keys[part.name]], part.shape(shape)
        same = found.dtype == part.dtype or {found.dtype, part.dtype} == {"U8", "F8_E4M3"}
        if not same or found.nbytes != storage_nbytes(part.dtype, wanted):
            raise MalformedFile(
                f"{found.key}: expected {part.dtype} {wanted} for a {name} weight of {shape}, "
                f"found {found.dtype} {found.shape}",
                path=source.path,
            )


def _is_per_row(scale: TensorSpec) -> bool:
    return scale.size > 1 or len(scale.shape) == 2
