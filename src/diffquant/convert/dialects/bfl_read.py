"""Find layers of Black Forest Labs' own files, and of ModelOpt's, which share a layout.

====== ========================================================================================
fp8r   `weight` E4M3 (N, K), `weight_scale` float32 (N,): the same numbers as fp8_e4m3_rowwise
nvfp4  `weight`, `weight_scale`, `weight_scale_2`, `input_scale`: low nibble first (nvfp4_low.py)
====== ========================================================================================

BFL's files carry no marker: they are told by these tensors, and by the absence of every marker of
another program. ModelOpt states itself in the header, `quantization_config` with its name as
producer. Where neither says which nibble comes first, an nvfp4 layer is refused by name: read the
wrong way round it would look like weights. Source: diffusers 0.42.1 quantizers/bfl/bfl_quantizer.py
maybe_update_state_dict; nvidia-modelopt 0.47.0 torch/export/unified_export_hf.py:260-275,
convert_hf_config.py:157-176.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Set
from typing import Any

from diffquant.convert.dialects.found import Bound, Finder, input_scales, kept_beside
from diffquant.convert.dialects.nvfp4_low import bind_nvfp4_low, is_nvfp4, scale_layouts
from diffquant.convert.logical import LogicalTensor
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["bfl_finder", "modelopt_finder"]

_HEADER = "quantization_config"
_LAYERS = "_quantization_metadata"
_PARTS = ("weight_scale", "weight_scale_2", "pre_quant_scale", "comfy_quant")
_CANNOT_TELL = "which nibble comes first cannot be told"


def modelopt_finder(source: TensorSource, _names: Set[str]) -> Finder:
    """Make the finder of nvfp4 layers in a file whose header names ModelOpt."""
    says = _is_modelopt(source.metadata.get(_HEADER))
    find = functools.partial(_find_modelopt, source) if says else None
    return Finder(find, dialect="modelopt")


def bfl_finder(source: TensorSource, names: Set[str]) -> Finder:
    """Make the finder of layers without a marker; behind those of the programs that write one."""
    if "weight_scale" not in names:
        return Finder(None, dialect="bfl")
    other = _LAYERS in source.metadata or not names.isdisjoint(("comfy_quant", "scaled_fp8"))
    return Finder(functools.partial(_find_bfl, source, other), dialect="bfl")


def _is_modelopt(text: Any) -> bool:  # noqa: ANN401 - a value of a header
    try:
        config = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    producer = config.get("producer") if isinstance(config, dict) else None
    return isinstance(producer, dict) and producer.get("name") == "modelopt"


def _find_modelopt(source: TensorSource, spec: TensorSpec) -> Bound | None:
    layer = spec.key.removesuffix(".weight")
    if layer == spec.key or not is_nvfp4(source, spec, layer):
        return None
    if f"{layer}.comfy_quant" in source.specs:  # ModelOpt writes none: another program did
        return None
    layouts = scale_layouts(source, spec, layer)
    if f"{layer}.pre_quant_scale" in source.specs:
        return _refused(source, spec, layer, "nvfp4 of ModelOpt with pre_quant_scale")
    if len(layouts) > 1 and _LAYERS in source.metadata:
        why = "nvfp4 of ModelOpt for ComfyUI, whose scales may lie by rows or in tiles,"
        return _refused(source, spec, layer, why)
    tensor = bind_nvfp4_low(source, spec, layer, tiled=layouts == ("tiles",))
    return Bound(
        tensor,
        _beside(source, layer),
        (f"{spec.key}: nvfp4 of ModelOpt by the header: low nibble first, unlike ComfyUI's",),
    )


def _find_bfl(source: TensorSource, other: bool, spec: TensorSpec) -> Bound | None:
    layer = spec.key.removesuffix(".weight")
    if layer == spec.key:
        return None
    if is_nvfp4(source, spec, layer):
        if other or f"{layer}.input_scale" not in source.specs:
            return _refused(source, spec, layer, f"nvfp4 without a marker: {_CANNOT_TELL}; it")
        if scale_layouts(source, spec, layer) == ("tiles",):
            why = f"nvfp4 without a marker, its scales in tiles: {_CANNOT_TELL}; it"
            return _refused(source, spec, layer, why)
        tensor = bind_nvfp4_low(source, spec, layer, tiled=False)
        return Bound(
            tensor,
            _beside(source, layer),
            (
                f"{spec.key}: nvfp4 without a marker is read as Black Forest Labs' files and "
                "diffusers have it: low nibble first, scales by rows",
            ),
        )
    scale = source.specs.get(f"{layer}.weight_scale")
    rows = spec.shape[:1]
    if other or scale is None or spec.dtype != "F8_E4M3" or len(spec.shape) != 2:
        return None
    if scale.dtype != "F32" or scale.shape != rows or rows == (1,):
        return None
    parts = {"weight": spec.key, "scale": scale.key}
    beside, aside = kept_beside(source, layer)
    tensor = LogicalTensor(
        spec.key, spec.shape, "fp8_e4m3_rowwise", parts, spec.dtype, beside=beside
    )
    return Bound(tensor, _beside(source, layer), set_aside=aside)


def _beside(source: TensorSource, layer: str) -> tuple[str, ...]:
    keys = (f"{layer}.{part}" for part in _PARTS)
    return (*(key for key in keys if key in source.specs), *input_scales(source.specs, layer))


def _refused(source: TensorSource, spec: TensorSpec, layer: str, what: str) -> Bound:
    why = f"{what} is not read"
    tensor = LogicalTensor(spec.key, spec.shape, "", {"weight": spec.key}, spec.dtype, why)
    return Bound(tensor, _beside(source, layer))
