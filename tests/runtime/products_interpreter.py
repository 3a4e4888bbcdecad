"""Triton's kernels of products in 8 bits under its interpreter, to the reference: JSON on stdout.

Run by test_products.py in a process of its own, since the interpreter is chosen when triton is
imported. Shapes are small and odd: several tiles, and ends inside of one.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from packed_parts import random_parts

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS
from diffquant.runtime.kernels import rows as reference
from diffquant.runtime.kernels.triton import few, gemm, levels, rows
from diffquant.runtime.kernels.triton.few_tiles import FewTile

SMALL = gemm.GemmTile(m=32, n=32, k=32, stages=1, warps=4)
ROWS = {"plain": (70, 0), "one step": (64, 0), "256": (512, 256), "64": (192, 64), "16": (48, 16)}
# Rows, dtype, tile: None is the table's, which shares K out; others: all of K, a rest of each step.
FEW = (
    (1, torch.float32, None),
    (18, torch.float32, None),
    (64, torch.float16, FewTile(64, 256, 4, group=16)),
)
# One of each way to hold weights.
MAIN = ("q8_0", "q4_0", "q4_k", "q6_k", "nvfp4", "fp8_e4m3_scaled", "int8_rowwise", "nf4")
FEW_OF_MAIN = (
    (1, torch.float16, FewTile(4, 512, 1)),
    (1, torch.float32, FewTile(16, 128, 1, group=4, programs=12)),
)
PRODUCTS = ((5, 7, 48), (70, 40, 112), (33, 65, 64))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def awkward(count, columns, dtype):
    """Ordinary rows; then zeros, NaN, infinity, tiny, huge, ties of both kinds."""
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(columns)) * 3
    x[1] = 0
    x[2, 3], x[3, 5] = float("nan"), float("-inf")
    x[4] *= 1e-6
    x[5] = torch.arange(columns) - columns // 2
    x[6] = (torch.arange(columns) % 33) / 512.0  # codes below 2**-6 once the row is scaled
    x[6, 0] = 448.0
    return x.to(dtype)


def near_codes(q, wanted):
    """Whether codes are neighbours where they differ, and differ in few places."""
    step = (wanted.float().abs() / 8).clamp(min=1) if q.dtype != torch.int8 else 1
    gap = (q.float() - wanted.float()).abs() / step
    return float(gap.max()) <= 1 and float((gap > 0).float().mean()) < 0.01


def quantized(kind, dtype, case):
    columns, rotation = ROWS[case]
    x = awkward(8, columns, dtype)
    wanted_q, wanted = reference.quantize_rows(x, kind, rotation=rotation)
    q, scale = rows.quantize_rows(x, kind, rotation=rotation)
    near = 2e-6 if rotation else 0.0  # sums in another order
    if not torch.allclose(scale.nan_to_num(-1), wanted.nan_to_num(-1), rtol=near, atol=0):
        return "scales differ"
    good = wanted.isfinite()[:, 0]
    if good.tolist() != [True, True, False, False, True, True, True, True]:
        return f"finite rows are {good.tolist()}"
    if rotation and near_codes(q[good], wanted_q[good]):
        return ""
    different = int((bits(q[good]) != bits(wanted_q[good])).sum())
    return f"{different} codes differ" if different else ""


def long_rows(kind):
    """Longer than what is held in registers."""
    held = rows._WIDEST
    rows._WIDEST = 64
    x = awkward(8, 150, torch.float32)
    found, wanted = rows.quantize_rows(x, kind), reference.quantize_rows(x, kind)
    rows._WIDEST = held
    good = wanted[1].isfinite()[:, 0]
    same = torch.equal(bits(found[0][good]), bits(wanted[0][good]))
    return "" if same and torch.equal(found[1][good], wanted[1][good]) else "differ"


def strided(kind):
    """Columns cut out of wider rows, and every second column."""
    wide = torch.randn(6, 200)
    wrong = []
    for name, x in (("cut", wide[:, 3:99]), ("every second", wide[:, ::2])):
        found, wanted = rows.quantize_rows(x, kind), reference.quantize_rows(x, kind)
        if not all(torch.equal(bits(a), bits(b)) for a, b in zip(found, wanted, strict=True)):
            wrong.append(name)
    return ", ".join(wrong)


def product(kind, shape, one_scale, bias, descriptors):
    """Largest difference to the reference, in units of the largest sum of magnitudes."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m)
    a, a_scale = reference.quantize_rows(torch.randn(m, k, generator=generator), kind)
    b, b_scale = reference.quantize_rows(torch.randn(n, k, generator=generator), kind)
    if one_scale:
        b_scale = b_scale.amax().reshape(())
    added = torch.randn(n, generator=generator) if bias else None
    given = (a, a_scale, b, b_scale, added, torch.float32)
    wanted = reference.multiply_rows(*given)
    found = gemm.multiply_rows(*given, tile=SMALL._replace(descriptors=descriptors))
    sums = (a.float().abs() @ b.float().abs().T) * a_scale * b_scale.reshape(1, -1)
    return float((found - wanted).abs().max() / sums.max())


def activations(count, columns, dtype):
    """Small numbers, and NaN where nothing may be read: behind the last row."""
    room = torch.full((count * columns + 64,), float("nan"), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    room[:-64] = torch.randn(count * columns, generator=generator) * 0.01
    return room[:-64].view(count, columns)


def few_rows(name):
    """Largest difference to decoding and multiplying, in units of the sums of magnitudes."""
    row = FORMATS[name]
    shape = (7, 3 * 256 if row.block_size == 256 else 320 if row.block_size else 300)
    parts = random_parts(name, shape)
    for key, part in parts.items():
        if part.dtype.is_floating_point and part.dtype.itemsize == 1:
            parts[key] = part.float().nan_to_num(1, 1, 1).to(part.dtype)
    if not few.serves(name, parts, shape):
        return "not served"
    worst = {}
    for count, dtype, tile in FEW + (FEW_OF_MAIN if name in MAIN else ()):
        weight = KERNELS[name](parts, shape, dtype).double()
        x = activations(count, shape[1], dtype)
        bias = torch.linspace(-1, 1, shape[0], dtype=dtype)
        wanted = x.double() @ weight.T + bias.double()
        found = few.few_rows(x, name, parts, shape, bias, tile=tile).double()
        within = wanted.abs() < 6e4 if dtype == torch.float16 else wanted.isfinite()
        if not bool(within.any()):
            continue
        sums = x.double().abs() @ weight.abs().T + 1
        gap = float(((found - wanted).abs() / sums)[within].max().nan_to_num(1.0))
        key = str(dtype).removeprefix("torch.")
        worst[key] = max(worst.get(key, 0.0), gap)
    return worst


def unpacked(name):
    parts = random_parts(name, (7, 512))
    found = levels.levels(name, parts, (7, 512))
    return "" if torch.equal(found, reference.levels(name, parts, (7, 512))) else "differ"


def main():
    packed = [
        one.name for one in FORMATS.values() if one.codec in ("convrot_w4a4", "asym_w4a8_int8")
    ]
    kinds, half = ("fp8", "int8"), (torch.float32, torch.float16, torch.bfloat16)
    with np.errstate(all="ignore"):
        found = {
            "rows": {
                f"{kind} {dtype} {case}": quantized(kind, dtype, case)
                for kind in kinds
                for dtype in half
                for case in ROWS
            },
            "long": {kind: long_rows(kind) for kind in kinds},
            "strided": {kind: strided(kind) for kind in kinds},
            "products": {
                f"{kind} {shape} one={one} bias={bias} descriptors={way}": product(
                    kind, shape, one, bias, way
                )
                for kind in kinds
                for shape in PRODUCTS
                for one, bias in ((False, True), (True, False))
                for way in (False, True)
            },
            "few": {name: few_rows(name) for name in sorted(few.FORMATS_SERVED)},
            "levels": {name: unpacked(name) for name in packed},
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
