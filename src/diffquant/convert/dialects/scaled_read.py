"""Find fp8 weights with a scale beside them and no `comfy_quant`: the legacy `scaled_fp8` files.

A tensor `<prefix>scaled_fp8` marks every layer behind its prefix. Its dtype says which fp8 (float32
stands for e4m3fn), two elements ask for products in full precision. Two spellings of the scale
circulate, `scale_weight` (older ComfyUI) and `weight_scale` (current). What lies is not believed:
the weight's own dtype decides, and each of these is read right with a warning:

- a marker of another fp8 than the weight;
- e5m2, which ComfyUI labels float8_e4m3fn all the same;
- `weight_scale` under this marker, or a layer that the header does not name: ComfyUI leaves the
  scale out.

Source: Comfy-Org/ComfyUI@09708ea:comfy/utils.py convert_old_quants.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set

from diffquant.convert.dialects.found import (
    Bound,
    Finder,
    check_scale,
    input_scales,
    kept_beside,
)
from diffquant.convert.dialects.markers import HEADER
from diffquant.convert.logical import LogicalTensor
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["scaled_finder"]

_FORMATS = {
    "F8_E4M3": ("fp8_e4m3_scaled", "float8_e4m3fn"),
    "F8_E5M2": ("fp8_e5m2_scaled", "float8_e5m2"),
}
_MARKER = "scaled_fp8"
_LEFT_OUT = "ComfyUI leaves the scale out; it is applied"


def scaled_finder(source: TensorSource, names: Set[str]) -> Finder:
    """Make the finder of a source."""
    markers = []
    if _MARKER in names:
        markers = [spec for key, spec in source.specs.items() if key.split(".")[-1] == _MARKER]
    scaled = not names.isdisjoint(("weight_scale", "scale_weight"))
    find = functools.partial(_find, source, markers) if scaled else None
    return Finder(find, tuple(spec.key for spec in markers), dialect="scaled_fp8")


def _find(source: TensorSource, markers: Sequence[TensorSpec], spec: TensorSpec) -> Bound | None:
    layer = spec.key.removesuffix(".weight") if spec.key.endswith(".weight") else ""
    scale = _scale_key(source.specs, layer)
    if not layer or not spec.dtype.startswith("F8_") or not scale:
        return None
    warnings = list(check_scale(source, scale, spec))
    name, called = _FORMATS.get(spec.dtype, ("", ""))
    why = "" if name else f"{spec.dtype} with a scale is not supported"
    marker = _marker_of(markers, layer)
    warnings += [f"{spec.key}: {text}" for text in _wrong(source, spec, scale, marker)]
    beside, aside = kept_beside(source, layer)
    tensor = LogicalTensor(
        spec.key,
        spec.shape,
        name,
        {"weight": spec.key, "scale": scale},
        spec.dtype,
        why,
        called=called if marker is not None else "",
        marked=_MARKER if marker is not None else "",
        beside=beside,
        notes={"full_precision_matrix_mult": True} if marker and marker.size == 2 else {},
    )
    return Bound(tensor, (scale, *input_scales(source.specs, layer)), tuple(warnings), aside)


def _marker_of(markers: Sequence[TensorSpec], layer: str) -> TensorSpec | None:
    """The marker with the longest prefix that the layer has."""
    fits = [one for one in markers if layer.startswith(one.key.removesuffix(_MARKER))]
    return max(fits, key=lambda one: len(one.key), default=None)


def _wrong(
    source: TensorSource, spec: TensorSpec, scale: str, marker: TensorSpec | None
) -> list[str]:
    if marker is None:
        return ["scale without a marker; it is applied"]
    if HEADER in source.metadata:
        return [f"{_MARKER} marks it and {HEADER} does not name it: {_LEFT_OUT}"]
    found = []
    says = "F8_E4M3" if marker.dtype == "F32" else marker.dtype
    if says != spec.dtype:
        found.append(f"it is {spec.dtype} and {_MARKER} says {says}; the weight is believed")
    if spec.dtype == "F8_E5M2":
        found.append(f"under {_MARKER} ComfyUI labels every weight float8_e4m3fn, and it is e5m2")
    if scale.endswith(".weight_scale"):
        found.append(f"its scale is called weight_scale under {_MARKER}: {_LEFT_OUT}")
    return found


def _scale_key(specs: Mapping[str, TensorSpec], layer: str) -> str:
    return next((k for k in (f"{layer}.weight_scale", f"{layer}.scale_weight") if k in specs), "")
