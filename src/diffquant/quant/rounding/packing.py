"""Codes and scales into the parts of a format and out of them, beside the codecs' own encoders.

Scales are kept per run: (B,), where run b is `block` elements of the flattened weight, of a padded
row, or a row. `settle` stores them and says what a decoder will find, `spread` repeats that per
element, `with_codes` stores codes. What a decoder makes of the parts is `values * spread`, bit for
bit; but int8_bnb multiplies twice, so that the last bit may differ, W4A8 rounds onto an int8 grid,
and what is rotated is rotated back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.asym_w4a8_int8 import GROUP_SIZE
from diffquant.quant.codecs.blocks_128 import BLOCK_SIZE as SQUARE
from diffquant.quant.codecs.double_quant import compress, expand
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.int8_bnb import ONE_LEVEL
from diffquant.quant.codecs.mxfp8 import SCALES as POWERS
from diffquant.quant.codecs.swizzle import rounded_up, swizzle, unswizzle
from diffquant.quant.formats import FORMATS
from diffquant.quant.rounding.levels import LEVELS

__all__ = [
    "blocks_of",
    "columns_of",
    "scales_of",
    "settle",
    "spread",
    "stored_scales",
    "with_codes",
]

_E4M3 = e4m3_table()


def blocks_of(weight: Float32, fmt: str) -> Float32:
    """The weight as runs that share a scale, zeros behind the last: (B, size)."""
    row = LEVELS[fmt]
    if row.run == "row":
        return weight
    if row.run == "flat":
        flat = np.zeros(rounded_up(weight.size, row.block), np.float32)
        flat[: weight.size] = weight.reshape(-1)
        return flat.reshape(-1, row.block)
    whole = np.zeros((len(weight), rounded_up(weight.shape[1], row.block)), np.float32)
    whole[:, : weight.shape[1]] = weight
    return whole.reshape(-1, row.block)


def columns_of(importance: Float32 | None, columns: int, fmt: str) -> Float32:
    """What an error in each column weighs, as `blocks_of` lays columns out; zeros behind a row."""
    row = LEVELS[fmt]
    wide = rounded_up(columns, row.block) if row.run == "padded" else columns
    out = np.zeros(wide, np.float32)
    out[:columns] = 1 if importance is None else importance
    return out


def scales_of(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], fmt: str) -> Float32:
    """Scales of runs as the decoder uses them, (B,); of formats whose scales can be chosen."""
    if fmt.endswith("_dq"):
        return expand(parts)
    if "absmax" in parts:
        return parts["absmax"].reshape(-1).astype(np.float32, copy=False)
    if "scb" in parts:
        return parts["scb"].reshape(-1) * ONE_LEVEL
    if "block_scale" in parts:
        block = LEVELS[fmt].block
        byte = unswizzle(parts["block_scale"], shape[0], rounded_up(shape[1], block) // block)
        return stored_scales(byte.reshape(-1), parts, fmt)
    return parts["scale"].reshape(-1).astype(np.float32, copy=False)


def stored_scales(byte: Bytes, parts: Mapping[str, NDArray[Any]], fmt: str) -> Float32:
    """What bytes of scales mean, of the two formats that keep them in bytes."""
    if fmt == "mxfp8":
        return POWERS[byte]
    scales: Float32 = np.float32(parts["tensor_scale"]) * _E4M3[byte]
    return scales


def spread(scales: Float32, parts: Parts, shape: tuple[int, int], fmt: str) -> Float32:
    """The scale of every element, (R, K); those of `parts` where scales cannot be chosen."""
    row, (rows, columns) = LEVELS[fmt], shape
    if row.run == "flat":
        return scales.repeat(row.block)[: rows * columns].reshape(shape)
    if row.run == "padded":
        whole = scales.reshape(rows, -1).repeat(row.block, axis=1)
        return np.ascontiguousarray(whole[:, :columns])
    if row.run == "row":
        return np.ascontiguousarray(np.broadcast_to(scales[:, None], shape))
    if "s_rel" in parts:
        steps = _E4M3[parts["s_rel"]] * parts["s_channel"][:, None]
        return steps.repeat(GROUP_SIZE, axis=1)
    if "block_scale" in parts:
        squares = parts["block_scale"].repeat(SQUARE, axis=0)[:rows]
        return np.ascontiguousarray(squares.repeat(SQUARE, axis=1))
    return np.full(shape, parts["scale"], np.float32)


def settle(scales: Float32, stored: Bytes | None, parts: Parts, fmt: str) -> tuple[Parts, Float32]:
    """Put chosen scales into the parts, and read them back: what is stored may be rounded again.

    Args:
        scales: (B,).
        stored: (B,) bytes that mean these scales, where the format keeps bytes.
        parts: the plain encoder's.
        fmt: FORMATS name.

    Returns:
        The parts, whose codes no longer fit, and the scales that a decoder will find in them.
    """
    if stored is not None:
        per_row = LEVELS[fmt].block // (2 if fmt == "nvfp4_comfy" else 1)
        high, blocks = len(parts["weight"]), parts["weight"].shape[1] // per_row
        whole = np.zeros((high, blocks), np.uint8)
        whole[: stored.size // blocks] = stored.reshape(-1, blocks)
        return {**parts, "block_scale": swizzle(whole)}, scales
    if fmt.endswith("_dq"):
        nested = compress(scales, np.float32(parts["nested_offset"]))
        return {**parts, **nested}, expand(nested)
    if fmt == "int8_bnb":
        scb = scales / ONE_LEVEL
        return {**parts, "scb": scb}, scb * ONE_LEVEL
    name = "absmax" if "absmax" in parts else "scale"
    return {**parts, name: scales.reshape(parts[name].shape)}, scales


def with_codes(codes: Bytes, parts: Parts, fmt: str) -> Parts:
    """Replace the plain encoder's codes: (R, K) stored codes."""
    weight = parts["weight"]
    if LEVELS[fmt].run == "flat":
        flat = codes.reshape(-1)
        if flat.size % 2:  # behind the last, what the plain encoder puts there
            flat = np.append(flat, weight.reshape(-1)[-1] & np.uint8(15))
        return {**parts, "weight": (flat[::2] << np.uint8(4) | flat[1::2]).reshape(weight.shape)}
    if FORMATS[fmt].rotation and weight.shape[1] * 2 == codes.shape[1]:
        pairs = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)  # even columns are the low nibbles
        return {**parts, "weight": pairs.view(weight.dtype)}
    four = fmt == "nvfp4_comfy"
    whole = np.zeros((len(weight), weight.shape[1] * (2 if four else 1)), np.uint8)
    whole[: codes.shape[0], : codes.shape[1]] = codes
    if four:
        whole = whole[:, ::2] << np.uint8(4) | whole[:, 1::2]
    return {**parts, "weight": whole.view(weight.dtype)}
