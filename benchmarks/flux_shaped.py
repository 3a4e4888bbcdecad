"""A bfloat16 checkpoint of any size with the names and widths of Flux.1-dev and fewer blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = 3072
HEADS = 24
Shapes = dict[str, tuple[int, ...]]


def flux_shapes(hidden: int, double: int, single: int) -> Shapes:
    """Flux.1-dev's names; text widths 4096 and 768 scale with the hidden size."""
    head = 128 if hidden % 128 == 0 and hidden > 128 else hidden // 2
    text, pooled, mlp = hidden * 4096 // 3072, hidden * 768 // 3072, 4 * hidden
    out: Shapes = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    linear("img_in", hidden, 64)
    linear("txt_in", hidden, text)
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", pooled)):
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    linear("final_layer.linear", 64, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            linear(f"{name}_mod.lin", 6 * hidden, hidden)
            linear(f"{name}_attn.qkv", 3 * hidden, hidden)
            linear(f"{name}_attn.proj", hidden, hidden)
            linear(f"{name}_mlp.0", mlp, hidden)
            linear(f"{name}_mlp.2", hidden, mlp)
            for norm in ("query", "key"):
                out[f"{name}_attn.norm.{norm}_norm.scale"] = (head,)
    for block in range(single):
        name = f"single_blocks.{block}"
        linear(f"{name}.modulation.lin", 3 * hidden, hidden)
        linear(f"{name}.linear1", 3 * hidden + mlp, hidden)
        linear(f"{name}.linear2", hidden, hidden + mlp)
        for norm in ("query", "key"):
            out[f"{name}.norm.{norm}_norm.scale"] = (head,)
    return out


def size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def blocks_for(nbytes: float) -> tuple[int, int]:
    """Double and single blocks, one to two as in Flux, for at least this many bytes."""
    double = 1
    while 2 * size(flux_shapes(HIDDEN, double, 2 * double)) < nbytes:
        double += 1
    single = 2 * double
    while single > 1 and 2 * size(flux_shapes(HIDDEN, double, single - 1)) >= nbytes:
        single -= 1
    return double, single


def build(path: Path, shapes: Shapes) -> int:
    """Write random bfloat16 weights (deviation 0.02): real bytes, a block of noise repeated."""
    normal = np.random.default_rng(0).standard_normal((1 << 23) + 4099, np.float32)
    noise = ((normal * np.float32(0.02)).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header: dict[str, Any] = {}
    at = 0
    for key, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in (2 * math.prod(shape) for shape in shapes.values()):
            while left > 0:
                file.write(noise[: min(left, len(noise))])
                left -= len(noise)
    return path.stat().st_size
