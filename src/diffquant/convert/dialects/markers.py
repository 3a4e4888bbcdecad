"""What ComfyUI files say of their layers: markers beside them, or one text in the header.

Writers differ, and some of what they write their own loader cannot read. Read all the same, each
with a warning:

- no `format` in the marker: told from the dtypes beside it (comfy-quants@55f0a26 writes
  {"convrot": true, "per_row": true}; ComfyUI stops at it);
- names in `_quantization_metadata` without the prefix that the tensors have: ComfyUI would load
  the layer without its scale;
- fields inside a nested `params`, which may be stale: what stands outside goes first.

Source: Comfy-Org/ComfyUI@0271a46:comfy/ops.py _load_quantized_module, @09708ea:comfy/utils.py
convert_old_quants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.convert.dialects.found import read_json
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource

__all__ = ["Marker", "read_markers"]

HEADER = "_quantization_metadata"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
# Dtype of the weight -> the only format that has such a weight and one `weight_scale`.
_GUESSES = {"I8": "int8_tensorwise", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class Marker:
    """What a file says of one layer.

    Attributes:
        format: ComfyUI's name of the format, "" where nothing says it.
        fields: everything said, nested `params` brought out.
        where: "marker" tensor or "header".
        warnings: what is wrong with how it is said.
    """

    format: str
    fields: Mapping[str, Any]
    where: str
    warnings: tuple[str, ...] = ()


def read_markers(source: TensorSource) -> dict[str, Marker]:
    """Layer -> what the file says of it; marker tensors go before the header.

    Raises:
        MalformedFile: a marker is no JSON object, or a name in the header fits several layers.
    """
    found: dict[str, Marker] = {}
    for name, fields in _header(source).items():
        layer, warnings = _layer(source, name)
        found[layer] = _marker(source, layer, fields, "header", warnings)
    for key in source.specs:
        if key.endswith(".comfy_quant"):
            layer = key.removesuffix(".comfy_quant")
            found[layer] = _marker(source, layer, read_json(source, key), "marker", ())
    return found


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
        f"{hits[0]}: {HEADER} calls it {name!r}, without the prefix of its tensors; ComfyUI takes "
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
    spec = source.specs.get(f"{layer}.weight")
    guess = _GUESSES.get(spec.dtype, "") if spec and f"{layer}.weight_scale" in source.specs else ""
    if guess:
        warnings += (
            f"{layer}: its marker names no format; taken for {guess} by its {spec and spec.dtype} "
            "weight, while ComfyUI stops at such a file (Unknown quantization format)",
        )
    return Marker(guess, flat, where, warnings)
