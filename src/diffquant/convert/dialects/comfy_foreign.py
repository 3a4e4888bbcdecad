"""ComfyUI's layouts that are read and never written: 6-bit W6A8, AWQ, codebooks of other kinds.

    asym_w4a8_int8, 6 bits   weight (N, 3 K / 4) int8: K / 2 bytes of low nibbles, then K / 4 bytes
                             with two upper bits per column; level = (code - 32) * s_rel
    awq_w4a16                weight (N, K / 2) int8: codes 0-15, even columns in the low nibble;
                             weight_scale, weight_zeros (K / g, N); w = (code - 8) * scale + zero

Source: comfy_kitchen 0.2.40 tensor/w4a8_packed.py, backends/eager/w4a8_int8.py,
tensor/awq_w4a16.py:78-130. comfy-quants@a89e7a1 calls the zeros `weight_zero`: both are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.dialects.markers import Marker
from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.floats import float32_of
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.rotation import rotate

__all__ = ["foreign_layer"]

_GROUPS = (4, 16, 64, 256, 1024)
Keys = Mapping[str, str]


def foreign_layer(
    source: TensorSource, spec: TensorSpec, layer: str, marker: Marker
) -> LogicalTensor | None:
    """A layer in one of these layouts, None for any other.

    Raises:
        MalformedFile: sizes of its parts do not belong together.
    """
    make = _MAKERS.get(marker.format)
    return make(source, spec, layer, marker) if make and len(spec.shape) == 2 else None


def _six_bits(
    source: TensorSource, spec: TensorSpec, layer: str, marker: Marker
) -> LogicalTensor | None:
    keys = {"s_rel": f"{layer}.weight_s_rel", "s_channel": f"{layer}.weight_s_channel"}
    block = marker.fields.get("group_size", 16)
    turn = marker.fields.get("convrot_groupsize", 256)
    if any(key not in source.specs for key in keys.values()):
        return None
    if type(block) is not int or block < 1 or turn not in _GROUPS or spec.dtype != "I8":
        return None
    n, stored = spec.shape
    k = source.specs[keys["s_rel"]].size // max(n, 1) * block
    if stored * 8 != k * 6 or f"{layer}.weight_codebook" in source.specs:
        return None
    _sizes(source, {keys["s_rel"]: n * k // block, keys["s_channel"]: n}, spec)
    if k % turn or k % block:
        raise MalformedFile(
            f"{spec.key}: {k} columns are no whole groups of {turn} and {block}", path=source.path
        )
    decoder = functools.partial(_decode_six, spec.key, keys, k, block, turn)
    parts = {"weight": spec.key, **keys}
    return LogicalTensor(spec.key, (n, k), "", parts, spec.dtype, foreign="w6a8", decoder=decoder)


def _decode_six(
    key: str,
    keys: Keys,
    k: int,
    block: int,
    turn: int,
    source: TensorSource,
    rows: tuple[int, int],
) -> NDArray[np.float32]:
    packed = source.read(key, rows).reshape(rows[1] - rows[0], -1)
    low, high = packed[:, : k // 2], packed[:, k // 2 :]
    code = np.stack([low & 15, low >> 4], axis=2).reshape(len(packed), k)
    upper = (high[:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    code |= (upper.reshape(len(packed), k) << 4).astype(np.uint8)
    scale = source.specs[keys["s_rel"]]
    raw = source.read(scale.key, rows)
    step = e4m3_table()[raw] if scale.dtype in ("U8", "F8_E4M3") else float32_of(raw, scale.dtype)
    level = code.astype(np.float32) - np.float32(32)
    level = level.reshape(len(packed), -1, block) * step.reshape(len(packed), -1, 1)
    level = np.clip(np.rint(level), -127, 127).reshape(len(packed), k)
    channel = float32_of(source.read(keys["s_channel"]), source.specs[keys["s_channel"]].dtype)
    return rotate(level * channel[rows[0] : rows[1], None], turn)


def _awq(
    source: TensorSource, spec: TensorSpec, layer: str, marker: Marker
) -> LogicalTensor | None:
    spellings = (f"{layer}.weight_zeros", f"{layer}.weight_zero")
    zeros = next((key for key in spellings if key in source.specs), "")
    keys = {"scale": f"{layer}.weight_scale", "zeros": zeros}
    block = marker.fields.get("group_size", 64)
    if not zeros or keys["scale"] not in source.specs or spec.dtype not in ("I8", "U8"):
        return None
    n, k = spec.shape[0], spec.shape[1] * 2
    if type(block) is not int or block < 1 or k % block:
        raise MalformedFile(
            f"{spec.key}: {k} columns are no whole groups of {block!r:.40}", path=source.path
        )
    _sizes(source, dict.fromkeys(keys.values(), n * k // block), spec)
    decoder = functools.partial(_decode_awq, spec.key, keys, n, k, block)
    parts = {"weight": spec.key, **keys}
    return LogicalTensor(
        spec.key, (n, k), "", parts, spec.dtype, foreign="awq_w4a16", decoder=decoder
    )


def _decode_awq(
    key: str,
    keys: Keys,
    n: int,
    k: int,
    block: int,
    source: TensorSource,
    rows: tuple[int, int],
) -> NDArray[np.float32]:
    packed = source.read(key, rows).reshape(rows[1] - rows[0], -1)
    code = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1, block)
    scale, zero = (
        float32_of(source.read(name), source.specs[name].dtype)
        .reshape(k // block, n)[:, rows[0] : rows[1]]
        .T[:, :, None]
        for name in (keys["scale"], keys["zeros"])
    )
    decoded = (code.astype(np.float32) - np.float32(8)) * scale + zero
    return decoded.reshape(len(packed), k)


def _sizes(source: TensorSource, wanted: Mapping[str, int], weight: TensorSpec) -> None:
    for key, size in wanted.items():
        if source.specs[key].size != size:
            raise MalformedFile(
                f"{key}: expected {size} values for {weight.key} of {weight.shape}, found "
                f"{source.specs[key].shape}",
                path=source.path,
            )


_MAKERS: Mapping[str, Callable[..., LogicalTensor | None]] = {
    "asym_w4a8_int8": _six_bits,
    "awq_w4a16": _awq,
}
