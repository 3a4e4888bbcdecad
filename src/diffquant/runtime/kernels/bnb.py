"""The torch reference decoders of bitsandbytes' formats; see quant/codecs/{nf4,double_quant}.py.

nf4 fp4         weight: uint8 (ceil(N K / 2),), high nibble first; absmax: float32 (blocks,)
nf4_dq fp4_dq   absmax: uint8 (blocks,); nested_absmax: float32 (ceil(blocks / 256),);
nested_offset: float32 ()
int8_bnb        weight: int8 (N, K); scb: float32 (N,)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.quant.codecs import fp4_bnb, nf4
from diffquant.quant.codecs.double_quant import NESTED_BLOCK
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE
from diffquant.quant.codecs.int8_bnb import ONE_LEVEL
from diffquant.runtime.kernels.fields import Kernel, Parts

__all__ = ["FLAT", "KERNELS"]

_TABLES = {"nf4": tuple(nf4.CODE.tolist()), "fp4": tuple(fp4_bnb.CODE.tolist())}


def _absmax(parts: Parts) -> Tensor:
    absmax = parts["absmax"].reshape(-1)
    if "nested_absmax" not in parts:
        return absmax
    table = torch.from_numpy(DYNAMIC_MAP).to(absmax.device)
    nested = parts["nested_absmax"].reshape(-1).repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    return table[absmax.int()] * nested + parts["nested_offset"]


def _four_bits(kind: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    packed, absmax = parts["weight"].reshape(-1), _absmax(parts)
    table = torch.tensor(_TABLES[kind], dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).int()
    count = math.prod(shape)
    scales = absmax.repeat_interleave(BLOCK_SIZE)[:count]
    return (table[codes[:count]] * scales).reshape(shape).to(dtype)


def _int8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scaled = parts["weight"].reshape(len(parts["scb"]), -1).float() * parts["scb"].reshape(-1, 1)
    return (scaled * float(ONE_LEVEL)).reshape(shape).to(dtype)


KERNELS: Mapping[str, Kernel] = {
    "nf4": functools.partial(_four_bits, "nf4"),
    "nf4_dq": functools.partial(_four_bits, "nf4"),
    "fp4": functools.partial(_four_bits, "fp4"),
    "fp4_dq": functools.partial(_four_bits, "fp4"),
    "int8_bnb": _int8,
}
# They run through the flattened weight, so that rows begin anywhere.
FLAT = frozenset({"nf4", "nf4_dq", "fp4", "fp4_dq"})
