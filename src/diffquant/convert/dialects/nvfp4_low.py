"""NVFP4 with the even column in the low nibble: ModelOpt's layout, read and never written.

    L.weight          (N, K / 2) U8, two 4-bit floats per byte, the even column in the low nibble
    L.weight_scale    (N, K / 16) E4M3, by rows; or in tiles of 128 by 4 where ModelOpt was told so
    L.weight_scale_2  one float32

decoded = magnitude * (weight_scale * weight_scale_2), both products rounded to float32. ComfyUI's
nvfp4 has the same names, dtypes and sizes with the nibbles the other way round, so that nothing in
the tensors tells them apart: only a statement of the file does (bfl_read.py). Source: diffusers
0.42.1 quantizers/bfl/utils.py dequantize_nvfp4; nvidia-modelopt 0.47.0
torch/quantization/qtensor/nvfp4_tensor.py:338, torch/export/diffusers_utils.py:972-1026.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.nvfp4_comfy import BLOCK_SIZE, PAD, VALUES
from diffquant.quant.codecs.swizzle import unswizzle
from diffquant.quant.layout import tiles

__all__ = ["Nvfp4Low", "bind_nvfp4_low", "is_nvfp4", "scale_layouts"]


@dataclass(frozen=True, slots=True)
class Nvfp4Low:
    """Where one weight's parts lie; sizes were checked before."""

    weight: str
    scale: str
    tensor_scale: str
    columns: int
    tiled: bool


def is_nvfp4(source: TensorSource, spec: TensorSpec, layer: str) -> bool:
    """Whether a layer has nvfp4's tensors, whichever nibble comes first."""
    scale = source.specs.get(f"{layer}.weight_scale")
    return (
        spec.dtype == "U8"
        and len(spec.shape) == 2
        and scale is not None
        and scale.dtype in ("F8_E4M3", "U8")
        and f"{layer}.weight_scale_2" in source.specs
    )


def scale_layouts(source: TensorSource, spec: TensorSpec, layer: str) -> tuple[str, ...]:
    """How the scales may lie by their shape: "rows", "tiles", both where the shapes coincide."""
    n, k = spec.shape[0], spec.shape[1] * 2
    shape = source.specs[f"{layer}.weight_scale"].shape
    wanted = {"rows": (n, k // BLOCK_SIZE), "tiles": tiles(BLOCK_SIZE)((n, k))}
    return tuple(name for name, one in wanted.items() if one == shape and not k % BLOCK_SIZE)


def bind_nvfp4_low(
    source: TensorSource, spec: TensorSpec, layer: str, *, tiled: bool
) -> LogicalTensor:
    """The weight of a layer.

    Rows that were padded to 16 are told by the bias.

    Raises:
        MalformedFile: sizes do not belong together.
    """
    scale, whole = (source.specs[f"{layer}.{one}"] for one in ("weight_scale", "weight_scale_2"))
    rows, columns = spec.shape[0], spec.shape[1] * 2
    if ("tiles" if tiled else "rows") not in scale_layouts(source, spec, layer):
        raise MalformedFile(
            f"{scale.key}: expected a scale for each {BLOCK_SIZE} of {(rows, columns)}, found "
            f"{scale.shape}",
            path=source.path,
        )
    if whole.dtype != "F32" or whole.size != 1:
        raise MalformedFile(
            f"{whole.key}: expected one F32, found {whole.dtype} {whole.shape}", path=source.path
        )
    bias = source.specs.get(f"{layer}.bias")
    if bias is not None and rows - PAD < bias.size <= rows:
        rows = bias.size
    state = Nvfp4Low(spec.key, scale.key, whole.key, columns, tiled)
    parts = {"weight": spec.key, "block_scale": scale.key, "tensor_scale": whole.key}
    return LogicalTensor(
        spec.key,
        (rows, columns),
        "",
        parts,
        spec.dtype,
        foreign="nvfp4 (low nibble first)",
        decoder=functools.partial(_decode, state),
    )


def _decode(state: Nvfp4Low, source: TensorSource, rows: tuple[int, int]) -> NDArray[np.float32]:
    count, blocks = rows[1] - rows[0], state.columns // BLOCK_SIZE
    packed = source.read(state.weight, rows).reshape(count, state.columns // 2)
    nibbles = np.stack([packed & 15, packed >> 4], axis=2)
    values = VALUES[nibbles].reshape(count, blocks, BLOCK_SIZE)
    if state.tiled:
        first, last = rows[0] // 128 * 128, -(-rows[1] // 128) * 128
        found = source.read(state.scale, (first, last)).reshape(last - first, -(-blocks // 4) * 4)
        byte = unswizzle(found, last - first, blocks)[rows[0] - first : rows[1] - first]
    else:
        byte = source.read(state.scale, rows).reshape(count, blocks)
    with np.errstate(all="ignore"):
        whole = source.read(state.tensor_scale).view("<f4")[0]
        weight: NDArray[np.float32] = values * (e4m3_table()[byte] * whole)[:, :, None]
    return weight.reshape(count, state.columns)
