"""Stored parts of weights in any number format, as random bits: for every test of decoders."""

import math

import numpy as np
import torch

from diffquant.core.dtypes import STORAGE
from diffquant.quant.formats import FORMATS

# Where each format keeps float16 numbers; iq1_m spreads its one over the top nibbles of four words.
HALVES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    **dict.fromkeys(("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), (0,)),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "mxfp4": (),
    "nvfp4": (),
    "iq1_s": (0,),
    "iq1_m": (),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
# Bytes of other scales that could overflow, and the bits they may have.
FINITE = {"iq1_m": ((55, 0xBF),), "mxfp4": ((0, 0x7F),)}
# What a scale may be that no encoder writes: the last two are subnormal in their dtype.
ODD_HALVES = np.array([np.inf, 0.0, np.nan, -0.0, 6e-8, -3e-6], np.float16)
ODD_FLOATS = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -7e-45], np.float32)
TORCH = {
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def random_blocks(name, rows, columns, seed=0):
    """Random bytes with finite, ordinary scales: every field of a block takes every value."""
    elements, nbytes = FORMATS[name].block_size, STORAGE[name.upper()].block_nbytes
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // elements, nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        scale = generator.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8).reshape(-1, 2)
    for start, mask in FINITE.get(name, ()):
        blocks[:, start] &= mask
    return blocks.reshape(rows, -1)


def _odd_blocks(name, data):
    blocks = data.reshape(-1, STORAGE[name.upper()].block_nbytes)
    for start in HALVES[name]:
        count = min(len(blocks), len(ODD_HALVES))
        blocks[:count, start : start + 2] = ODD_HALVES.view(np.uint8).reshape(-1, 2)[:count]
    if name == "mxfp4":
        blocks[:3, 0] = (0, 1, 255)
    if name == "nvfp4":
        blocks[:4, 0] = (0, 0x7F, 0xFF, 0x80)


def random_parts(name, shape, *, odd=False):
    """Parts as a file holds them, any bits; `odd` puts zeros, infinities and NaN into scales."""
    row, generator = FORMATS[name], np.random.default_rng(len(name))
    if name in HALVES:
        data = random_blocks(name, shape[0], math.prod(shape[1:]))
        if odd:
            _odd_blocks(name, data)
        return {"weight": torch.from_numpy(data)}
    parts = {}
    for part in row.parts:
        size = part.shape(shape)
        if part.dtype in ("F32", "F16"):
            array = generator.standard_normal(size).astype(part.dtype.replace("F", "float"))
            if odd and array.size >= 5:
                count = min(array.size, len(ODD_FLOATS))
                array.reshape(-1)[:count] = ODD_FLOATS[:count]
            parts[part.name] = torch.from_numpy(np.asarray(array))
        elif part.dtype == "BF16":
            parts[part.name] = torch.from_numpy(generator.standard_normal(size)).bfloat16()
        else:
            data = torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8))
            parts[part.name] = data.view(TORCH.get(part.dtype, torch.uint8))
    return parts


def difference(found, wanted):
    """Where two results differ in a bit, for people; empty if nowhere. Which NaN says nothing."""
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{found.dtype} {found.shape}, wanted {wanted.dtype} {wanted.shape}"
    bits = {2: torch.int16, 4: torch.int32}[wanted.dtype.itemsize]
    same = (found.view(bits) == wanted.view(bits)) | (found.isnan() & wanted.isnan())
    if bool(same.all()):
        return ""
    at = int((~same).flatten().nonzero()[0])
    one, other = float(found.flatten()[at]), float(wanted.flatten()[at])
    return f"{int((~same).sum())} of {same.numel()} differ, at {at}: {one!r}, wanted {other!r}"


def same_numbers(found, wanted):
    """Bit for bit, signs of zeros included; which NaN it is says nothing."""
    return not difference(found, wanted)
