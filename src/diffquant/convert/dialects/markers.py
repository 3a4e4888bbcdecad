"""What ComfyUI files say of their layers: markers beside them, or one text in the header.

Writers differ, and some of what they write their own loader cannot read. Read all the same, each
with a warning:

- no `format` in the marker: told from the dtypes beside it (comfy-quants@55f0a26 writes
  {"convrot": true, "per_row": true}; ComfyUI stops at it);
- names in `_quantization_metadata` without the prefix that the tensors have: ComfyUI would load
  the layer without its scale;
- names in it that no layer has;
- fields inside a nested `params`, which may be stale: what stands outside goes first.

Where a header and a marker tensor speak of one layer the header goes first, as it does in ComfyUI,
which writes it over the tensor. Source: Comfy-Org/ComfyUI@0271a46:comfy/ops.py
_load_quantized_module, @09708ea:comfy/utils.py convert_old_quants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffquant.convert.dialects.found import read_json
from diffquant.core.errors import MalformedFile, shorten
from diffquant.core.floats import PLAIN_FLOATS
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["HEADER", "Marker", "read_markers"]

HEADER = "_quantization_metadata"
_ENDING = ".comfy_quant"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
# Dtype of the weight, whether its scales are bytes -> the only format with a `weight_scale` alone.
_GUESSES = {
    ("I8", False): "int8_tensorwise",
    ("F8_E4M3", False): "float8_e4m3fn",
    ("F8_E5M2", False): "float8_e5m2",
    ("F8_E4M3", True): "mxfp8",
}
_OTHERS = ("weight_scale_2", "weight_zeros", "weight_zero", "weight_s_rel", "weight_s_channel")


@dataclass(frozen=True, slots=True)
class Marker:
    """What a file says of one layer.

    Attributes:
        format: ComfyUI's name of the format, "" where nothing says it.
        fields: everything said, nested `params` brought out.
        where: "comfy_quant" or "_quantization_metadata".
        warnings: what is wrong with how it is said.
    """

    format: str
    fields: Mapping[str, Any]
    where: str
    warnings: tuple[str, ...] = ()


def read_markers(source: TensorSource) -> tuple[dict[str, Marker], tuple[str, ...]]:
    """Layer -> what the file says of it, and what is wrong with the header as a whole.

    Raises:
        MalformedFile: a marker is no JSON object, or a name in the header fits several layers.
    """
    found = {
        key.removesuffix(_ENDING): _marker(
            source, key.removesuffix(_ENDING), read_json(source, key), "comfy_quant", ()
        )
        for key in source.specs
        if key.endswith(_ENDING)
    }
    without = []
    for name, fields in _header(source).items():
        layer, warnings = _layer(source, name)
        marker = _marker(source, layer, fields, HEADER, warnings)
        other = found.get(layer)
        if other is not None and other.fields != marker.fields:
            said = f"{json.dumps(dict(marker.fields))[:80]} and its comfy_quant something else"
            warnings = (f"{layer}: {HEADER} says {said}; the header is followed, as by ComfyUI",)
            marker = replace(marker, warnings=marker.warnings + warnings)
        found[layer] = marker
        if f"{layer}.weight" not in source.specs:
            without.append(layer)
    if not without:
        return found, ()
    return found, (f"{HEADER} names {len(without)} layers that are not there: {shorten(without)}",)


def _header(source: TensorSource) -> dict[str, Mapping[str, Any]]:
    text = source.metadata.get(HEADER)
    if not isinstance(text, str):
        return {}
    try:
        layers = json.loads(text).get("layers", {})
        return {name: value for name, value in layers.items() if isinstance(value, dict)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise MalformedFile(
            f"{HEADER} in the header is not JSON with layers", path=source.path
        ) from error


def _layer(source: TensorSource, name: str) -> tuple[str, tuple[str, ...]]:
    """The layer of the file that a name in the header means."""
    if f"{name}.weight" in source.specs:
        return name, ()
    hits = [prefix + name for prefix in _PREFIXES if f"{prefix}{name}.weight" in source.specs]
    if len(hits) > 1:
        raise MalformedFile(
            f"{HEADER}: {name!r} may be {' or '.join(hits)}: expected the full name of a layer",
            path=source.path,
        )
    if not hits:
        return name, ()
    return hits[0], (
        f"{hits[0]}: {HEADER} names it without the prefix of its tensors; ComfyUI takes "
        "names as they stand, and would load the layer without its scale",
    )


def _marker(
    source: TensorSource,
    layer: str,
    fields: Mapping[str, Any],
    where: str,
    warnings: tuple[str, ...],
) -> Marker:
    nested = fields.get("params")
    flat = {**nested, **fields} if isinstance(nested, Mapping) else dict(fields)
    flat.pop("params", None)
    if isinstance(nested, Mapping):
        stale = [name for name, value in nested.items() if flat.get(name) != value]
        if stale:
            warnings += (
                f"{layer}: the marker says {stale[0]} {flat[stale[0]]!r:.40} and, in its params, "
                f"{nested[stale[0]]!r:.40}; the first is followed",
            )
    name = flat.get("format")
    if isinstance(name, str):
        return Marker(name, flat, where, warnings)
    guess = _guess(source.specs, layer, flat)
    if guess:
        warnings += (
            f"{layer}: its marker names no format; taken for {guess} by the dtypes of its tensors, "
            "while ComfyUI stops at such a file (Unknown quantization format)",
        )
    return Marker(guess, flat, where, warnings)


def _guess(specs: Mapping[str, TensorSpec], layer: str, fields: Mapping[str, Any]) -> str:
    """The format of a layer whose marker names none; "" where several come into question.

    nvfp4 does: its nibbles have two orders. So does what says linear_dtype, which is W4A4's.
    """
    weight, scale = specs.get(f"{layer}.weight"), specs.get(f"{layer}.weight_scale")
    odd = any(f"{layer}.{one}" in specs for one in _OTHERS) or "linear_dtype" in fields
    if weight is None or scale is None or odd:
        return ""
    return _GUESSES.get((weight.dtype, scale.dtype not in PLAIN_FLOATS), "")
