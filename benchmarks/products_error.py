"""What products in 8 bits cost in numbers, by the reference on a CPU: nothing is timed.

python benchmarks/products_error.py [--model examples/flux1-shapes] [--steps 12] [--json FILE]

    layers     one layer of Gaussian weights (512 x 3072) in each format, Gaussian tokens: relative
               error of its output in 8 bits, to the exact product of the same packed weight; and
               the same with one column of activations in 64 thirty times as large
    pictures   the model's pictures (four prompts, seed 0, float32) with its blocks in fp8 or int8,
               to exact ones: PSNR pooled over all pixels, largest error of a layer
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import environment

from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
from diffquant.runtime import low_bit
from diffquant.runtime.compute import Engine
from diffquant.runtime.judges import Pooled
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.scorers import DEMO_PROMPTS

SHAPE, TOKENS = (512, 3072), 256
LAYERS = (
    "bf16", "fp8_e4m3_scaled", "fp8_e4m3_rowwise", "int8_tensor", "int8_rowwise", "int8_convrot",
    "q8_0", "q4_k",
)  # fmt: skip


def engine(kind: str) -> Engine:
    return Engine(kind, "reference", 0, False, (torch.float32,), "no card")


def packed(name: str) -> PackedWeight:
    """A Gaussian weight in a format."""
    weight = np.random.default_rng(0).standard_normal(SHAPE, np.float32) * 0.02
    if name == "bf16":
        return PackedWeight.of(torch.from_numpy(weight).bfloat16())
    row = FORMATS[name]
    stats = backend(row.codec, "reduce")(weight, fmt=name) if row.passes == 2 else None
    encoded = backend(row.codec, "encode")(weight, stats, fmt=name)
    views = {"F8_E4M3": torch.float8_e4m3fn}
    parts = {}
    for part in row.parts:
        data = torch.from_numpy(np.ascontiguousarray(encoded[part.name]))
        parts[part.name] = data.view(views[part.dtype]) if part.dtype in views else data
    if "scale" in parts:
        scale = parts["scale"].float()
        parts["scale"] = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    return PackedWeight((Segment(name, SHAPE, parts),))


def layer_rows() -> list[dict[str, Any]]:
    x = torch.randn(TOKENS, SHAPE[1], generator=torch.Generator().manual_seed(1))
    outliers = x.clone()
    outliers[:, ::64] *= 30
    rows = []
    for name in LAYERS:
        weight = packed(name)
        row: dict[str, Any] = {"format": name}
        for kind in ("fp8", "int8"):
            for label, tokens in (("", x), (" outliers", outliers)):
                layer = QuantLinear(SHAPE[1], SHAPE[0], bias=False)
                layer.bind(weight)
                layer.product = product = low_bit.LowBitLayer(kind, "", (torch.float32,))
                layer(tokens)
                row[kind + label] = product.error
        rows.append(row)
        print(f"{name:18}", *(f"{k} {v:.4f} " for k, v in row.items() if k != "format"), flush=True)
    return rows


def picture_rows(model: Path, steps: int) -> list[dict[str, Any]]:
    rows, exact = [], None
    low_bit.FEW = 3  # tiny models have few tokens
    for mode in ("exact", "fp8", "int8"):
        with contextlib.ExitStack() as files:
            opened = open_pipeline(model, files=files, dtype=torch.float32, device="cpu")
            denoiser = opened.pipeline.parts.denoiser
            found = (
                low_bit.assign(denoiser, mode, {mode: engine(mode)}) if mode != "exact" else None
            )
            width, height = opened.size
            made = opened.pipeline.run(
                PictureRequest(
                    tuple(DEMO_PROMPTS[:4]), seed=(0,) * 4, steps=steps, width=width, height=height
                )
            )
            images = made.images.numpy()
        if found is None:
            exact = images
            continue
        assert exact is not None
        pooled = Pooled()
        for wanted, other in zip(exact, images, strict=True):
            pooled.add(wanted, other)
        errors = [one.error for one in found.layers.values() if one.error is not None]
        rows.append({
            "compute": mode, "psnr_db": pooled.psnr_db, "worst_layer": max(errors),
            "layers": found.said,
        })  # fmt: skip
        print(f"{mode}: {pooled.psnr_db:.1f} dB, worst layer {max(errors):.3f}")
        print(*found.said, sep="\n", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/flux1-shapes"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with torch.no_grad():
        found = {
            "environment": environment(),
            "layers": layer_rows(),
            "pictures": picture_rows(args.model, args.steps),
        }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
