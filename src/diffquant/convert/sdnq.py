"""Decode rows of weights that SDNQ packed: codes times scales, a low-rank part, a rotation undone.

::

    w = round_s(codes * scale)                  signed codes, round_s: to the dtype of the scales
    w = round_s(codes * scale + zero_point)     unsigned codes; a zero point is a float offset
    w = round_u(round_u(w) + svd_up @ svd_down) where there is a low-rank part; its dtype
    w = w @ H                                   groups of a row, H symmetric, where it was rotated

H is the Kronecker power of a 4 x 4 Hadamard matrix where the group is a power of 4, of the 2 x 2
one where it is another power of 2. Source: sdnq 0.2.8 dequantizer.py, quant_utils.py (facts; the
program is another one). Codes and scales are exact; the low-rank part and the rotation are sums in
float32, whose order is not the reference's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.floats import float32_of
from diffquant.core.tensors import TensorSource
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.packed_int import UNITS, unpack

__all__ = ["SdnqState", "hadamard_group", "read_sdnq"]

Floats = NDArray[np.float32]

_H2 = np.array([[1, 1], [1, -1]], np.float32)
_H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)


@dataclass(frozen=True, slots=True)
class SdnqState:
    """Where one weight's parts lie and how they belong together; sizes were checked before.

    Attributes:
        weight, scale, zero_point, svd_up, svd_down: keys, "" for parts that are not there.
        codes: shape of the codes: (N, K), (N, groups, group) or a kernel's; rows first.
        scales: shape of the scales, as many dimensions as `codes`.
        bits: of packed codes, 0 where every code has a byte.
        offset: added to packed codes.
        turned: whether the file has columns first.
        svd_turned: the same for the low-rank part.
        hadamard: group that was rotated, 0 for none.
    """

    weight: str
    scale: str
    zero_point: str
    svd_up: str
    svd_down: str
    codes: tuple[int, ...]
    scales: tuple[int, ...]
    bits: int
    offset: int
    turned: bool
    svd_turned: bool
    hadamard: int


def hadamard_group(channels: int, largest: int) -> int:
    """The group that was rotated in rows of so many channels; 0 where there is none.

    Source: sdnq 0.2.8 quant_utils.py get_hadamard_group_size.
    """
    size = 1 << (min(channels, largest) - 1).bit_length()
    while channels % size:
        size //= 2
    return size if size >= 4 else 0


def read_sdnq(source: TensorSource, state: SdnqState, rows: tuple[int, int]) -> Floats:
    """Decode a half-open range of rows: (R, K) float32."""
    count = rows[1] - rows[0]
    k = math.prod(state.codes[1:])
    codes = _codes(source, state, rows).reshape(count, *state.codes[1:])
    dtype = source.specs[state.scale].dtype
    scale = _scales(source, state, state.scale, rows)
    if state.zero_point:  # multiplied and added with one rounding, as torch does
        zero = _scales(source, state, state.zero_point, rows)
        weight = (codes.astype(np.float64) * scale + zero).astype(np.float32)
    else:
        weight = codes * scale
    weight = _round(weight.reshape(count, k), dtype)
    if state.svd_up:
        weight = _low_rank(source, state, weight, rows)
    return _rotate(weight, state.hadamard) if state.hadamard else weight


def _codes(source: TensorSource, state: SdnqState, rows: tuple[int, int]) -> Floats:
    spec = source.specs[state.weight]
    k = math.prod(state.codes[1:])
    if state.bits:
        unit = UNITS[state.bits]
        length = len(unit.elements)
        first, last = rows[0] * k // length, -(-rows[1] * k // length)
        width = spec.nbytes * length // (math.prod(state.codes) * unit.nbytes)  # bytes to a byte
        raw = _units(source, state.weight, unit.nbytes * width, first, last)
        found = unpack(np.ascontiguousarray(raw[::width]), state.bits)
        at = rows[0] * k - first * length
        codes = found[at : at + (rows[1] - rows[0]) * k].astype(np.float32)
        return codes + np.float32(state.offset)
    if state.turned:
        n = state.codes[0]
        raw = np.ascontiguousarray(source.read(state.weight).reshape(k, n)[:, rows[0] : rows[1]].T)
    else:
        raw = source.read(state.weight, rows if spec.rows > 1 else None)
    return _numbers(raw.reshape(-1), spec.dtype)


def _units(source: TensorSource, key: str, nbytes: int, first: int, last: int) -> NDArray[np.uint8]:
    spec = source.specs[key]
    if spec.row_nbytes == nbytes:  # a unit per row, as SDNQ stores most of them
        return source.read(key, (first, last))
    return source.read(key)[first * nbytes : last * nbytes]


def _numbers(raw: NDArray[np.uint8], dtype: str) -> Floats:
    if dtype == "F8_E4M3":
        table: Floats = e4m3_table()
        return table[raw]
    if dtype == "F8_E5M2":
        halves: Floats = (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        return halves
    return (raw.view(np.int8) if dtype == "I8" else raw).astype(np.float32)


def _scales(source: TensorSource, state: SdnqState, key: str, rows: tuple[int, int]) -> Floats:
    whole = float32_of(source.read(key), source.specs[key].dtype).reshape(state.scales)
    return whole if state.scales[0] == 1 else whole[rows[0] : rows[1]]


def _low_rank(
    source: TensorSource, state: SdnqState, weight: Floats, rows: tuple[int, int]
) -> Floats:
    """Add the low-rank part, in its dtype as the reference does."""
    spec = source.specs[state.svd_up]
    up = float32_of(source.read(state.svd_up), spec.dtype).reshape(spec.shape)
    spec = source.specs[state.svd_down]
    down = float32_of(source.read(state.svd_down), spec.dtype).reshape(spec.shape)
    if state.svd_turned:
        up, down = up.T, down.T
    added: Floats = np.ascontiguousarray(up[rows[0] : rows[1]]) @ np.ascontiguousarray(down)
    return _round(_round(weight, spec.dtype) + added, spec.dtype)


def _round(values: Floats, dtype: str) -> Floats:
    """Values as a dtype holds them, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype != "BF16":
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), values, rounded)


def _rotate(weight: Floats, group: int) -> Floats:
    """Multiply every group of a row by H, factor by factor: no matrix of group x group is made."""
    factor = _H4 if group.bit_length() % 2 else _H2
    size = len(factor)
    out, inner = weight, 1
    while inner < group:
        out = np.matmul(factor, out.reshape(-1, size, inner))
        inner *= size
    return out.reshape(weight.shape) * np.float32(group**-0.5)
