"""Denoisers of ours at real size, made on the device in seconds, and what one step is given.

The plan of `diffquant quantize` says which tensor gets which format; a tile of TILE_ROWS Gaussian
rows is encoded per format and row length, and its bytes are repeated over the rows of a weight. So
numbers are ordinary, activations stay finite, and no file is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_peaks import FAMILIES
from random_weights import FOLDERS, GGUF, STD, Model, Random, is_norm
from torch import Tensor, nn

TILE_ROWS = 128
MODEL_KINDS = {"flux1": "flux", "sdxl": "unet", "qwen_image": "qwen_image"}
_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_VIEWED = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one step is given, by both programs' names.

    Attributes:
        pixels: (B, C, h, w), or tokens (B, L, C).
        side: of the latents.
        text: (B, T, width).
        pooled: (B, width), where the family has it.
    """

    pixels: Tensor
    side: int
    text: Tensor
    pooled: Tensor | None


class Tiles:
    """Encoded tiles of one run, on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._made: dict[tuple[str, int], dict[str, Tensor]] = {}

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Parts of a weight as the runtime holds them (packing.py)."""
        from diffquant.quant.formats import FORMATS

        row, flat = FORMATS[name], (shape[0], math.prod(shape[1:]))
        found = {}
        for part in row.parts:
            tile = self._tile(name, flat[1])[part.name]
            block = len(row.parts) == 1 and row.block_size
            size = (shape[0], row.nbytes((1, flat[1]))) if block else part.shape(flat)
            numel = math.prod(size)
            data = tile.repeat(-(-numel // tile.numel()))[:numel]
            if part.name == "scale":
                data = data.float()
                size = () if numel == 1 else (numel, 1)
            elif part.name != "weight" or row.flat_block:
                size = (numel,)
            found[part.name] = data.reshape(size)
        return found

    def _tile(self, name: str, columns: int) -> dict[str, Tensor]:
        from diffquant.quant.backends import backend
        from diffquant.quant.formats import FORMATS

        if (name, columns) not in self._made:
            row = FORMATS[name]
            generator = np.random.default_rng(columns)
            weight = generator.standard_normal((TILE_ROWS, columns), np.float32) * STD
            stats = backend(row.codec, "reduce")(weight, fmt=name) if row.passes == 2 else None
            encoded = backend(row.codec, "encode")(weight, stats, fmt=name)
            tile = {}
            for part in row.parts:
                data = torch.from_numpy(np.ascontiguousarray(encoded[part.name]))
                data = data.view(_VIEWED[part.dtype]) if part.dtype in _VIEWED else data
                tile[part.name] = data.reshape(-1).to(self.device)
            self._made[name, columns] = tile
        return self._made[name, columns]


def plain(key: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Ones for norms, else Gaussian numbers."""
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.fill_(1) if is_norm(key, shape) else made.normal_(0, STD)


@dataclass(frozen=True, slots=True)
class Planned:
    """A family's denoiser, by its keys.

    Attributes:
        logical, match, part: as convert names them; the tensors are random.
        hyper: what shapes do not tell.
    """

    logical: Any
    match: Any
    part: Any
    hyper: dict[str, Any]


def planned(family: str, *, tiny: bool) -> Planned:
    from diffquant.convert.binding import bind
    from diffquant.convert.detect import detect

    logical = bind(Random(Model(family, Path(), tiny).shapes("denoiser")))
    match = detect(logical.specs())
    part = match.part("denoiser")
    assert part is not None
    hyper = {key: fact.value for key, fact in part.hyper.items()}
    if tiny:
        text = (Model(family, Path(), tiny).example / FOLDERS[family] / "config.json").read_text()
        return Planned(logical, match, part, hyper | json.loads(text))
    return Planned(logical, match, part, hyper | dict(FAMILIES[family].hyper))


def ours(family: str, kind: str, device: str, *, tiny: bool) -> nn.Module:
    """A denoiser in a type, or in bfloat16 ("bf16")."""
    from diffquant.convert.match import to_layout
    from diffquant.convert.plan import Request, make_plan
    from diffquant.quant.types import type_named
    from diffquant.runtime.layers import PackedWeight, Segment
    from diffquant.runtime.loading import MODELS, build

    found = planned(family, tiny=tiny)
    formats: dict[str, str] = {}
    if kind != "bf16":
        container = "gguf" if kind in GGUF else "safetensors"
        plan = make_plan(found.logical, found.match, Request(container, type=type_named(kind)))
        for step in plan.part_steps("denoiser"):  # no format: as it is in the source
            formats[step.assignment.target] = step.decision.format or "bf16"
    tiles, weights = Tiles(device), {}
    for one in to_layout(found.part, MODELS[MODEL_KINDS[family]].layout):
        name, shape = formats.get(one.target, "bf16"), one.shape
        parts = (
            {"weight": plain(one.target, shape, _PLAIN[name], device)}
            if name in _PLAIN
            else tiles.parts(name, shape)
        )
        weights[one.target] = PackedWeight((Segment(name, shape, parts),))
    return build(MODEL_KINDS[family], weights, found.hyper, dtype=torch.bfloat16, device=device)


def inputs_for(family: str, device: str, *, tiny: bool) -> Inputs:
    """Of a picture of 1024 pixels (tiny: 64) and 512 tokens; SDXL's is guided, 77 tokens."""
    from diffquant.convert.match import to_layout
    from diffquant.runtime.loading import MODELS
    from diffquant.runtime.models.unet import AttentionSpec

    found, row = planned(family, tiny=tiny), MODELS[MODEL_KINDS[family]]
    shapes = {one.target: one.shape for one in to_layout(found.part, row.layout)}
    config = row.config_from(shapes, found.hyper)
    side = 8 if tiny else 128

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    if family == "sdxl":
        specs = [spec for block in config.inputs for spec in block]
        width = next(spec.context for spec in specs if isinstance(spec, AttentionSpec))
        pixels = random(2, config.in_channels, side, side)
        return Inputs(pixels, side, random(2, 77, width), random(2, config.label))
    pixels = random(1, (side // 2) ** 2, config.in_channels)
    text = random(1, 16 if tiny else 512, config.context)
    pooled = random(1, config.vector) if family == "flux1" else None
    return Inputs(pixels, side, text, pooled)


def step_of(family: str, model: nn.Module, inputs: Inputs) -> Step:
    """One prediction."""
    from diffquant.runtime.models.flux import image_ids

    device, side = inputs.pixels.device, inputs.side
    half = torch.full((len(inputs.pixels),), 0.5, device=device)
    if family == "sdxl":
        return lambda: model(inputs.pixels, half * 1000, inputs.text, inputs.pooled)
    if family == "qwen_image":
        sizes = [(1, side // 2, side // 2)]
        return lambda: model(inputs.pixels, half, inputs.text, sizes)
    img_ids = image_ids(side, side)
    txt_ids = torch.zeros(inputs.text.shape[1], 3)
    config: Any = model.config
    guidance = half * 7 if config.guidance else None
    return lambda: model(
        inputs.pixels, half, inputs.text, inputs.pooled, img_ids, txt_ids, guidance
    )
