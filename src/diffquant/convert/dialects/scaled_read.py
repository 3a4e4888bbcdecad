"""Find fp8 weights with a scale beside them and no `comfy_quant`: the legacy `scaled_fp8` files.

Two spellings of the scale circulate, `scale_weight` (older ComfyUI) and `weight_scale` (current).
Source: Comfy-Org/ComfyUI@09708ea:comfy/utils.py convert_old_quants.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from diffquant.convert.dialects.found import Bound, Finder, check_scale, input_scales
from diffquant.convert.logical import LogicalTensor
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["scaled_finder"]

_SCALED_FP8 = {"F8_E4M3": "fp8_e4m3_scaled", "F8_E5M2": "fp8_e5m2_scaled"}
_MARKER = "scaled_fp8"


def scaled_finder(source: TensorSource) -> Finder:
    """Make the finder of a source."""
    found = tuple(key for key in source.specs if key.split(".")[-1] == _MARKER)
    prefixes = tuple(key.removesuffix(_MARKER) for key in found)
    return Finder(functools.partial(_find, source, prefixes), found, dialect="scaled_fp8")


def _find(source: TensorSource, prefixes: tuple[str, ...], spec: TensorSpec) -> Bound | None:
    layer = spec.key.removesuffix(".weight") if spec.key.endswith(".weight") else ""
    scale = _scale_key(source.specs, layer)
    if not layer or not spec.dtype.startswith("F8_") or not scale:
        return None
    warnings = check_scale(source, scale, spec)
    parts = {"weight": spec.key, "scale": scale}
    name = _SCALED_FP8.get(spec.dtype, "")  # by the weight's dtype: a marker of e5m2 may lie
    why = "" if name else f"{spec.dtype} with a scale is not supported"
    tensor = LogicalTensor(spec.key, spec.shape, name, parts, spec.dtype, why)
    marked = any(spec.key.startswith(prefix) for prefix in prefixes)
    if not marked:
        warnings += (f"{spec.key}: scale without a marker; it is applied",)
    return Bound(tensor, (scale, *input_scales(source.specs, layer)), warnings)


def _scale_key(specs: Mapping[str, TensorSpec], layer: str) -> str:
    return next((k for k in (f"{layer}.weight_scale", f"{layer}.scale_weight") if k in specs), "")
