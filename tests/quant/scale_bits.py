"""Device functions of quant/codecs/triton/scales.py, beside what the CPU's codecs compute.

Run as a script under Triton's interpreter: JSON on stdout, how many numbers differ by function.
"""

import json
import os
import sys

if __name__ == "__main__":  # chosen when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl

from diffquant.quant.codecs.fp8_e4m3 import e4m3_bits, e4m3_table
from diffquant.quant.codecs.triton.scales import ceil_log2, e4m3_code, e4m3_value, floor_log2

_LANES = 1 << 13


@triton.jit
def _apply(src, dst, count, FUNCTION: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    value = tl.load(src + at, mask=at < count, other=1)
    tl.store(dst + at, FUNCTION(value), mask=at < count)


def near_powers(steps=256):
    """Bits of float32 magnitudes: every power of two, and its neighbours on both sides."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32).view(np.int32)
    found = (powers[:, None] + np.arange(-steps, steps + 1, dtype=np.int32)).ravel()
    return np.unique(found[(found > 0) & (found < 0x7F800000)])


def blocks_near_powers():
    """(R, 1024) weights; of every 32 the largest, or its 448th part, is near a power of two."""
    most = near_powers(steps=2).view(np.float32)
    with np.errstate(over="ignore"):
        most = np.concatenate([most, most * np.float32(448)])
    most = most[np.isfinite(most)]
    blocks = most[: most.size // 32 * 32, None] * np.linspace(1, -1, 32, dtype=np.float32)
    return np.ascontiguousarray(blocks.reshape(-1, 1024))


def rounded_log2(bits):
    """log2 in float32, as the codecs round it."""
    return np.log2(bits.view(np.float32).astype(np.float64)).astype(np.float32)


def cases():
    """Function, what it is given, what it must return, by name."""
    some = np.random.default_rng(7).integers(1, 0x7F800000, 1 << 16, dtype=np.int32)
    bits = np.concatenate([near_powers(), some])
    tops = np.arange(0x3A000000, 0x44000000, 1 << 14, dtype=np.int32)  # 2**-11 to 512, with ties
    around = (tops[:, None] + np.arange(-1, 2, dtype=np.int32)).ravel()
    special = np.array((0, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000), np.int32)
    sizes = np.concatenate([around, special, bits]).view(np.float32)
    codes = np.arange(128, dtype=np.int32)
    return {
        "floor_log2": (floor_log2, bits, np.floor(rounded_log2(bits)).astype(np.int32)),
        "ceil_log2": (ceil_log2, bits, np.ceil(rounded_log2(bits)).astype(np.int32)),
        "e4m3_code": (e4m3_code, sizes, e4m3_bits(sizes).astype(np.int32)),
        "e4m3_value": (e4m3_value, codes, e4m3_table()[:128]),
    }


def different(device):
    """How many of each function's numbers differ on a device."""
    result = {}
    for name, (function, given, wanted) in cases().items():
        found = torch.empty(wanted.shape, dtype=torch.from_numpy(wanted).dtype, device=device)
        programs = -(-given.size // _LANES)
        there = torch.from_numpy(given).to(device)
        _apply[programs,](
            there, found, given.size, FUNCTION=function, LANES=_LANES, enable_fp_fusion=False
        )
        result[name] = int((~_equal(found.cpu().numpy(), wanted)).sum())
    return result


def _equal(found, wanted):
    return (found == wanted) | ((found != found) & (wanted != wanted))


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        json.dump(different("cpu"), sys.stdout)
