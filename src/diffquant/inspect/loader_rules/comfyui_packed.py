"""ComfyUI and packed weights: `comfy_quant` markers, scales, and what it has no layers for."""

from __future__ import annotations

import re

from diffquant.convert.dialects.algos import QUANT_ALGOS, QUANTOPS
from diffquant.convert.dialects.markers import HEADER
from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import named, packed_as
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["PACKED"]

_OPS = "Comfy-Org/ComfyUI@0271a46:comfy/ops.py _load_quantized_module"
_ALGOS = "Comfy-Org/ComfyUI@0271a46:comfy/quant_ops.py QUANT_ALGOS"
_UTILS = "Comfy-Org/ComfyUI@09708ea:comfy/utils.py"

# Layers whose widths detection reads as the model's own: model_detection.py, detect_unet_config.
_DETECTED = re.compile(
    r"(^|\.)(img_in|txt_in|vector_in\.in_layer|x_embedder|context_embedder|cap_embedder\.1)\.weight$"
    r"|attn2\.to_k\.weight$"
)


def _scale_not_f32(case: Case) -> str | None:
    """Scales of 16 bits."""
    specs = case.subject.source.specs
    return named(
        one.parts["scale"]
        for one in case.tensors.values()
        if one.dialect in ("comfy", "scaled_fp8")
        and "scale" in one.parts
        and specs[one.parts["scale"]].dtype in ("BF16", "F16")
        and one.called != "awq_w4a16"
    )


def _no_format(case: Case) -> str | None:
    markers = case.markers.items()
    return named(
        (layer for layer, one in markers if not isinstance(one.fields.get("format"), str)),
        "layers",
    )


def _formats(case: Case) -> dict[str, list[str]]:
    """Format ComfyUI does not have -> layers that are marked so."""
    found: dict[str, list[str]] = {}
    for layer, one in case.markers.items():
        name = one.fields.get("format")
        if isinstance(name, str) and name not in QUANT_ALGOS:
            found.setdefault(name[:60], []).append(layer)
    return found


def _of_quantops(case: Case) -> str | None:
    rows = _formats(case)
    return _told({name: keys for name, keys in rows.items() if name in QUANTOPS})


def _of_nobody(case: Case) -> str | None:
    rows = _formats(case)
    return _told({name: keys for name, keys in rows.items() if name not in QUANTOPS})


def _told(rows: dict[str, list[str]]) -> str | None:
    found = [f"{name}: {named(keys, 'layers')}" for name, keys in rows.items()]
    return "; ".join(found) or None


def _header_without_prefix(case: Case) -> str | None:
    return named(
        (
            layer
            for layer, one in case.markers.items()
            if one.where == HEADER and layer not in case.header_layers
        ),
        "layers",
    )


def _not_linear(case: Case) -> str | None:
    return named(key for key in case.packed("comfy") if len(case.tensors[key].shape) != 2)


def _packed_detection(case: Case) -> str | None:
    """Layers that detection reads, stored narrower than they are."""
    specs = case.subject.source.specs
    return named(
        key
        for key, one in case.tensors.items()
        if _DETECTED.search(key) and one.is_quantized and specs[key].shape != one.shape
    )


def _other_packing(case: Case) -> str | None:
    """Packed weights that no marker of ComfyUI's speaks of, nor a plain fp8 cast."""
    known = ("comfy", "scaled_fp8", "bnb", "sdnq", "bfl")
    return named(
        (
            key
            for key, one in case.tensors.items()
            if one.is_quantized
            and one.dialect not in known
            and one.format not in ("fp8_e4m3", "fp8_e5m2")
        ),
        "weights",
    )


PACKED = (
    LoaderRule(
        "comfyui.bitsandbytes",
        "refuses",
        "its own loaders have no bitsandbytes formats: quantize from the high-precision source to "
        "fp8_scaled, nvfp4 or int8_convrot, or load it in Forge",
        _ALGOS,
        containers=FILES | {"component"},
        when=packed_as("bnb"),
    ),
    LoaderRule(
        "comfyui.sdnq",
        "refuses",
        "SDNQ's layers are read by SDNQ alone: `diffquant convert` the folder to .safetensors",
        _ALGOS,
        when=packed_as("sdnq"),
    ),
    LoaderRule(
        "comfyui.bfl",
        "refuses",
        "layers without a comfy_quant marker load as a plain cast, without their scales: "
        "quantize the high-precision source to fp8_scaled",
        f"{_UTILS} detect_layer_quantization",
        when=packed_as("bfl"),
    ),
    LoaderRule(
        "comfyui.other-packing",
        "refuses",
        "no marker says how they are packed, and it would load the bytes as numbers",
        f"{_UTILS} detect_layer_quantization",
        containers=FILES,
        when=_other_packing,
    ),
    LoaderRule(
        "comfyui.quantops",
        "refuses",
        "a format of convert_to_quant, which the node ComfyUI-QuantOps loads; ComfyUI alone stops "
        "(unsupported quantization format)",
        f"{_ALGOS}; silveroxides/ComfyUI-QuantOps README.md",
        when=_of_quantops,
    ),
    LoaderRule(
        "comfyui.unknown-format",
        "refuses",
        "ComfyUI has no such format and stops at the layer",
        _ALGOS,
        when=_of_nobody,
    ),
    LoaderRule(
        "comfyui.no-format",
        "refuses",
        "their comfy_quant names no format (unknown quantization format for layer): "
        "`diffquant quantize --allow-requantize` writes one that is marked",
        _OPS,
        when=_no_format,
    ),
    LoaderRule(
        "comfyui.header-names",
        "refuses",
        "_quantization_metadata names them without the prefix of their tensors: it takes names as "
        "they stand and loads the layers without their scales",
        f"{_UTILS} convert_old_quants",
        when=_header_without_prefix,
    ),
    LoaderRule(
        "comfyui.scale-dtype",
        "refuses",
        "scales of 16 bits stop it (scale must be f32); `diffquant convert` writes them as float32",
        "Comfy-Org/ComfyUI issues 11665, 11662",
        when=_scale_not_f32,
    ),
    LoaderRule(
        "comfyui.not-linear",
        "refuses",
        "a marker is honoured in linear layers alone",
        f"{_OPS}, mixed_precision_ops",
        when=_not_linear,
    ),
    LoaderRule(
        "comfyui.packed-detection",
        "refuses",
        "detection reads the model's widths from these layers and finds half of them: keep them in "
        "high precision",
        "Comfy-Org/ComfyUI issue 15273",
        kinds=MODELS,
        when=_packed_detection,
    ),
)
