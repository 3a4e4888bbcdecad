"""Every Triton decoder under Triton's interpreter, to the torch reference: JSON on stdout.

Run by test_triton_kernels.py in a process of its own, since the interpreter is chosen when triton
is imported. Tiles are small, so that small weights have several and end inside one.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from packed_parts import difference, random_parts

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS as REFERENCE
from diffquant.runtime.kernels import triton as fast
from diffquant.runtime.kernels.triton import blocks, flat, launch, rotated, scaled, tiled

SMALL = launch.Tile(weights=512, warps=4)
BLOCKWISE = ("fp8_e4m3_blockwise", "int8_blockwise")  # rows of 128: small tiles would be many
SHAPES = {
    "block 32": (3, 416),
    "block 64": (5, 192),
    "block 128": (128, 128),
    "block 256": (5, 256),
    "tiles": (20, 70),
    "flat": (7, 171),
    "rows": (5, 259),
    "rotated 256": (5, 256),
    "rotated 64": (3, 192),
    "rotated 16": (5, 112),
}


def shape_of(name):
    row = FORMATS[name]
    if row.is_padded:
        return SHAPES["tiles"]
    if row.flat_block:
        return SHAPES["flat"]
    if row.rotation:
        return SHAPES[f"rotated {row.rotation}"]
    return SHAPES[f"block {row.block_size}" if row.block_size else "rows"]


def cut(values):
    """To bfloat16 as the interpreter does it, towards zero; a card rounds (test_triton_cuda.py)."""
    return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def compare(name, shape, dtype, *, odd=False, parts=None):
    parts = random_parts(name, shape, odd=odd) if parts is None else parts
    wanted = REFERENCE[name](parts, shape, torch.float32)
    found = fast.KERNELS[name](parts, shape, dtype)
    if dtype == torch.bfloat16:
        normal = wanted.abs() >= torch.finfo(torch.float32).tiny  # it also loses subnormal numbers
        return difference(found[normal], cut(wanted[normal]))
    return difference(found, wanted.to(dtype))


def one_format(name):
    shape = shape_of(name)
    return {
        "float32": compare(name, shape, torch.float32),
        "float16": compare(name, shape, torch.float16),
        "bfloat16": compare(name, shape, torch.bfloat16),
        "odd scales": compare(name, shape, torch.float32, odd=True),
    }


def moved(parts):
    """The same parts, one byte (or number) into their storage, and with gaps between rows."""
    found = {}
    for name, part in parts.items():
        room = torch.zeros(part.numel() + 1, dtype=part.dtype)
        room[1:] = part.reshape(-1)
        found[name] = room[1:].view(part.shape)
    weight = found["weight"]
    found["weight"] = torch.stack((weight, weight), dim=-1)[..., 0]
    return found


def layouts():
    """What is not as usual: kernels of convolutions, odd addresses, no rows, scales as in files."""
    shape = (6, 256)
    per_row = {**random_parts("fp8_e4m3_scaled", shape), "scale": torch.rand(6, 1)}
    one = {**random_parts("int8_rowwise", shape), "scale": torch.tensor(0.5)}
    found = {"fp8 per row": compare("fp8_e4m3_scaled", shape, torch.float32, parts=per_row)}
    found["int8 one scale"] = compare("int8_rowwise", shape, torch.float32, parts=one)
    for name in ("q4_k", "q8_0", "nf4_dq", "int8_bnb", "mxfp8"):
        parts = moved(random_parts(name, shape))
        found[f"moved {name}"] = compare(name, shape, torch.float32, parts=parts)
    for name in ("mxfp8", "nvfp4_comfy"):  # more rows than a tile of scales has
        found[f"two tiles {name}"] = compare(name, (130, 150), torch.float32)
    for name in ("q6_k", "nf4"):
        parts, kernel = random_parts(name, shape), (6, 16, 4, 4)
        found[f"convolution {name}"] = compare(name, kernel, torch.float32, parts=parts)
        empty = fast.KERNELS[name]({k: v[:0] for k, v in parts.items()}, (0, 256), torch.float16)
        found[f"empty {name}"] = "" if empty.shape == (0, 256) else str(empty.shape)
    return found


def main():
    for module in (blocks, flat, scaled, tiled, rotated):
        module.REFERENCE = {}  # nothing may be left to it
    launch.TILES.update({n: SMALL for n in fast.KERNELS if n not in BLOCKWISE})
    with np.errstate(all="ignore"):
        results = {name: one_format(name) for name in fast.KERNELS}
        launch.TILES.clear()
        results["layouts"] = layouts()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
