"""What ComfyUI's loader knows by name, and what it asks of each: for reports, not for reading.

Source: Comfy-Org/ComfyUI@0271a46:comfy/quant_ops.py QUANT_ALGOS, comfy/ops.py
_load_quantized_module; silveroxides/ComfyUI-QuantOps README.md.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["QUANTOPS", "QUANT_ALGOS"]

# comfy_quant format -> dtype of the weight, and dtypes of companions that must be there.
QUANT_ALGOS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "float8_e4m3fn": ("F8_E4M3", {"weight_scale": ("F32",)}),
    "float8_e5m2": ("F8_E5M2", {"weight_scale": ("F32",)}),
    "int8_tensorwise": ("I8", {"weight_scale": ("F32",)}),
    "mxfp8": ("F8_E4M3", {"weight_scale": ("U8", "F8_E8M0")}),
    "nvfp4": ("U8", {"weight_scale": ("F8_E4M3",), "weight_scale_2": ("F32",)}),
    "convrot_w4a4": ("I8", {"weight_scale": ("F32",)}),
    "asym_w4a8_int8": ("I8", {"weight_s_rel": ("F8_E4M3", "U8"), "weight_s_channel": ("F32",)}),
    "awq_w4a16": (
        "I8",
        {"weight_scale": ("BF16", "F16", "F32"), "weight_zeros": ("BF16", "F16", "F32")},
    ),
}
# Formats of convert_to_quant that need the node ComfyUI-QuantOps.
QUANTOPS = frozenset({"float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "int8_blockwise"})
