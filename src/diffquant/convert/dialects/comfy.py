"""ComfyUI's layers: numbers, scales and a `comfy_quant` marker that names the format.

Keys behind `L.`: `weight`, `weight_scale` (float32; scales of blocks in tiles), `weight_scale_2`
(nvfp4), `comfy_quant` (uint8 JSON). Source: Comfy-Org/ComfyUI@0271a46:comfy/ops.py,
comfy/quant_ops.py; released comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.dialects.packed import Packed, Shape, json_tensor, layer_of, plain
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import format_named

__all__ = ["COMFY_FORMATS", "GROUP_SIZES", "ORIGINAL_SHAPE", "pack_comfy"]

# FORMATS name -> what comfy_quant calls it, and part -> ending of the key behind `L.`.
COMFY_FORMATS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "fp8_e4m3_scaled": ("float8_e4m3fn", {"scale": "weight_scale"}),
    "fp8_e5m2_scaled": ("float8_e5m2", {"scale": "weight_scale"}),
    "int8_tensor": ("int8_tensorwise", {"scale": "weight_scale"}),
    "int8_rowwise": ("int8_tensorwise", {"scale": "weight_scale"}),
    "fp8_e4m3_rowwise": ("float8_e4m3fn_rowwise", {"scale": "weight_scale"}),
    "fp8_e4m3_blockwise": ("float8_e4m3fn_blockwise", {"block_scale": "weight_scale"}),
    "int8_blockwise": ("int8_blockwise", {"block_scale": "weight_scale"}),
    "mxfp8": ("mxfp8", {"block_scale": "weight_scale"}),
    "nvfp4_comfy": (
        "nvfp4",
        {"block_scale": "weight_scale", "tensor_scale": "weight_scale_2"},
    ),
}
GROUP_SIZES = {"fp8_e4m3_blockwise": 128, "int8_blockwise": 128}  # said by the marker
# Key of the marker under which a padded weight's own shape is kept: loaders take theirs from the
# model and ignore it, we would otherwise read the padding as weights.
ORIGINAL_SHAPE = "orig_shape"


def pack_comfy(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    """Say what ComfyUI reads for one weight; formats without a row here are written plainly."""
    row = format_named(fmt)
    if fmt not in COMFY_FORMATS:
        return plain(key, fmt, shape, dtype)
    layer = layer_of(key, "comfy")
    name, endings = COMFY_FORMATS[fmt]
    marker: dict[str, object] = {"format": name}
    if fmt in GROUP_SIZES:
        marker["group_size"] = GROUP_SIZES[fmt]
    if row.is_padded and any(length % row.padding for length in shape):
        marker[ORIGINAL_SHAPE] = list(shape)
    return (
        *(
            Packed(
                TensorSpec(
                    f"{layer}.{endings.get(part.name, part.name)}", part.dtype, part.shape(shape)
                ),
                part.name,
            )
            for part in row.parts
        ),
        json_tensor(f"{layer}.comfy_quant", marker),
    )
