"""ComfyUI's layers: numbers, scales and a `comfy_quant` marker that names the format.

Keys behind `L.`: `weight`, `weight_scale` (float32; scales of blocks in tiles), `weight_scale_2`
(nvfp4), `weight_s_rel`, `weight_s_channel`, `weight_codebook` (W4A8), `comfy_quant` (uint8 JSON).
Source: Comfy-Org/ComfyUI@0271a46:comfy/ops.py, comfy/quant_ops.py; released comfy-kitchen 0.2.40.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffquant.convert.dialects.packed import Packed, Shape, json_tensor, layer_of, plain
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import FORMATS, format_named

__all__ = ["COMFY_FORMATS", "ORIGINAL_SHAPE", "ComfyFormat", "pack_comfy", "with_use"]

# Key of the marker under which a padded weight's own shape is kept: loaders take theirs from the
# model and ignore it, we would otherwise read the padding as weights.
ORIGINAL_SHAPE = "orig_shape"
_MARKER = ".comfy_quant"


@dataclass(frozen=True, slots=True)
class ComfyFormat:
    """What ComfyUI calls a format.

    Attributes:
        name: `format` in the marker.
        endings: part -> ending of its key behind `L.`.
        fields: what else the marker says; a reader needs the same.
    """

    name: str
    endings: Mapping[str, str]
    fields: Mapping[str, object] = field(default_factory=dict)


_SCALE = {"scale": "weight_scale"}
_BLOCK_SCALE = {"block_scale": "weight_scale"}
_W4A8 = {"s_rel": "weight_s_rel", "s_channel": "weight_s_channel", "codebook": "weight_codebook"}


def _rotated(
    codec: str, name: str, endings: Mapping[str, str], **fields: object
) -> dict[str, ComfyFormat]:
    return {
        row.name: ComfyFormat(name, endings, {**fields, "convrot_groupsize": row.rotation})
        for row in FORMATS.values()
        if row.codec == codec
    }


COMFY_FORMATS: Mapping[str, ComfyFormat] = {
    "fp8_e4m3_scaled": ComfyFormat("float8_e4m3fn", _SCALE),
    "fp8_e5m2_scaled": ComfyFormat("float8_e5m2", _SCALE),
    "int8_tensor": ComfyFormat("int8_tensorwise", _SCALE),
    "int8_rowwise": ComfyFormat("int8_tensorwise", _SCALE),
    **_rotated("int8_convrot", "int8_tensorwise", _SCALE, convrot=True),
    **_rotated("convrot_w4a4", "convrot_w4a4", _SCALE),
    **_rotated("asym_w4a8_int8", "asym_w4a8_int8", _W4A8, group_size=16),
    "fp8_e4m3_rowwise": ComfyFormat("float8_e4m3fn_rowwise", _SCALE),
    "fp8_e4m3_blockwise": ComfyFormat("float8_e4m3fn_blockwise", _BLOCK_SCALE, {"group_size": 128}),
    "int8_blockwise": ComfyFormat("int8_blockwise", _BLOCK_SCALE, {"group_size": 128}),
    "mxfp8": ComfyFormat("mxfp8", _BLOCK_SCALE),
    "nvfp4_comfy": ComfyFormat("nvfp4", {**_BLOCK_SCALE, "tensor_scale": "weight_scale_2"}),
}


def pack_comfy(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    """Say what ComfyUI reads for one weight; formats without a row here are written plainly."""
    row = format_named(fmt)
    if fmt not in COMFY_FORMATS:
        return plain(key, fmt, shape, dtype)
    layer, comfy = layer_of(key, "comfy"), COMFY_FORMATS[fmt]
    marker: dict[str, object] = {"format": comfy.name, **comfy.fields}
    if row.is_padded and any(length % row.padding for length in shape):
        marker[ORIGINAL_SHAPE] = list(shape)
    return (
        *(
            Packed(
                TensorSpec(
                    f"{layer}.{comfy.endings.get(part.name, part.name)}",
                    part.dtype,
                    part.shape(shape),
                ),
                part.name,
            )
            for part in row.parts
        ),
        json_tensor(f"{layer}.comfy_quant", marker),
    )


def with_use(
    packed: tuple[Packed, ...], input_scale: Shape | None, notes: Mapping[str, object]
) -> tuple[Packed, ...]:
    """Add to a copied layer how it is used: the scale of its input, and notes in its marker.

    Args:
        packed: of `pack_comfy`; layers without a marker are given back as they are.
        input_scale: shape of the scale of the layer's input, None where there is none.
        notes: fields for the marker.
    """
    marker = next((one for one in packed if one.spec.key.endswith(_MARKER)), None)
    if marker is None:
        return packed
    fields = {**json.loads(marker.constant), **notes}
    out = [one for one in packed if one is not marker]
    if input_scale is not None:
        key = f"{marker.spec.key.removesuffix(_MARKER)}.input_scale"
        out.append(Packed(TensorSpec(key, "F32", input_scale), "input_scale"))
    return (*out, json_tensor(marker.spec.key, fields))
