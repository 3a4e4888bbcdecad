"""Candidates of benchmarks/ under Triton's interpreter, to the reference: JSON on stdout.

Run by test_candidates.py in a process of its own, since the interpreter is chosen when triton is
imported. Tiles are small, so that small weights have several and end inside one.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from candidates import blocks, blocks_32, blocks_k, few, few_tiles
from gpu_few import FEW_FORMATS
from packed_parts import difference, random_parts

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton import launch

DECODERS = {**blocks_32.KERNELS, **blocks_k.KERNELS}
SINGLE, HALF = torch.float32, torch.float16
SHAPES = {32: (3, 416), 64: (5, 192), 256: (5, 256)}
# Rows, dtype, tile: None is the table's, which shares K out here; whole rows; a rest of each step.
FEW = (
    (1, SINGLE, None),
    (18, SINGLE, None),
    (64, HALF, few_tiles.FewTile(32, 256, 2, group=16)),
)
FEW_OF_MAIN = (
    (18, HALF, None),
    (1, HALF, few_tiles.FewTile(4, 512, 1)),
    (1, SINGLE, few_tiles.FewTile(8, 128, 1, group=4, programs=12)),
    (1, SINGLE, few_tiles.FewTile(16, 128, 1, cores=True)),
)


def decoded(name):
    shape = SHAPES[FORMATS[name].block_size]
    found = {}
    for case, dtype in (("float32", SINGLE), ("float16", HALF), ("odd scales", SINGLE)):
        parts = random_parts(name, shape, odd=case == "odd scales")
        wanted = REFERENCE[name](parts, shape, SINGLE).to(dtype)
        found[case] = difference(DECODERS[name](parts, shape, dtype), wanted)
    return found


def activations(count, columns, dtype):
    """Small numbers, and NaN where nothing may be read: behind the last row."""
    room = torch.full((count * columns + 64,), float("nan"), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    room[:-64] = torch.randn(count * columns, generator=generator) * 0.01
    return room[:-64].view(count, columns)


def few_rows(name):
    """Largest difference to decoding and multiplying, in units of the sums of magnitudes."""
    row = FORMATS[name]
    shape = (11, 320 if row.flat_block else 768 if row.block_size else 300)
    parts = random_parts(name, shape)
    for key, part in parts.items():
        if part.dtype.is_floating_point and part.dtype.itemsize == 1:
            parts[key] = part.float().nan_to_num(1, 1, 1).to(part.dtype)
    if not few.serves(name, parts, shape):
        return "not served"
    worst = {}
    for count, dtype, tile in FEW + (FEW_OF_MAIN if name in FEW_FORMATS else ()):
        weight = REFERENCE[name](parts, shape, dtype).double()
        x = activations(count, shape[1], dtype)
        bias = torch.linspace(-1, 1, shape[0], dtype=dtype)
        wanted = x.double() @ weight.T + bias.double()
        found = few.few_rows(x, name, parts, shape, bias, tile=tile).double()
        within = wanted.abs() < 6e4 if dtype == HALF else wanted.isfinite()
        if not bool(within.any()):
            continue
        sums = x.double().abs() @ weight.abs().T + 1
        gap = float(((found - wanted).abs() / sums)[within].max().nan_to_num(1.0))
        key = str(dtype).removeprefix("torch.")
        worst[key] = max(worst.get(key, 0.0), gap)
    return worst


def main():
    blocks.TILES.update(dict.fromkeys(DECODERS, launch.Tile(512, 4)))
    with np.errstate(all="ignore"):
        found = {
            "decoders": {name: decoded(name) for name in DECODERS},
            "few": {name: few_rows(name) for name in sorted(few.FORMATS_SERVED)},
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
