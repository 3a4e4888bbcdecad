"""Whether an autoencoder fits half precision, measured by pictures through it.

The largest output of every layer is noted in float32; then the same is decoded with weights and
layer outputs rounded to float16 and sums in float32, which is what GPUs do (and what a processor
without float16 arithmetic does in bearable time).

Inputs are two photographs that come with scikit-image, encoded where the file has an encoder, and
noise of unit variance in the denoiser's scale. Others may reach further: a limit that is nearly
touched is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffquant.convert.binding import bind
from diffquant.convert.match import PartMatch
from diffquant.convert.recognise import recognise_part
from diffquant.convert.vae_half import HALF_MAX
from diffquant.core.errors import UnknownArchitecture, UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source
from diffquant.runtime.judges import Pooled
from diffquant.runtime.layers import PackedLayer, PackedWeight, Segment
from diffquant.runtime.loading import build
from diffquant.runtime.models.autoencoder import to_pixels
from diffquant.runtime.models.vae_kl import AutoencoderKL
from diffquant.runtime.packing import packed_weights

__all__ = ["VaeRange", "decoded_pictures", "vae_range"]

_NOISE_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class VaeRange:
    """What an autoencoder's activations reach.

    Attributes:
        path: the file.
        size: side of the pictures, pixels.
        shapes: of its tensors, canonical names.
        peaks: module -> largest absolute output in float32.
        worst: the module that reaches furthest.
        peak: how far.
        fits: whether every layer stays within float16.
        half_psnr_db: pictures of float16 against those of float32; None when they are identical.
        half_finite: whether float16 gave numbers everywhere.
    """

    path: str
    size: int
    shapes: Mapping[str, tuple[int, ...]]
    peaks: Mapping[str, float]
    worst: str
    peak: float
    fits: bool
    half_psnr_db: float | None
    half_finite: bool


def vae_range(path: str | Path, *, size: int = 256) -> VaeRange:
    """Measure the autoencoder of a file or folder.

    Args:
        path: anything that holds a KL autoencoder.
        size: side of the pictures in pixels, a multiple of 64.

    Raises:
        UsageError: no autoencoder in it.
        UnknownArchitecture: one of a kind that the runtime does not run.
    """
    model, shapes = _loaded(path, size)
    with torch.inference_mode():
        with _watched(model) as peaks:
            latents = _latents(model, size)
            whole = [model.decode(one) for one in latents]
        with _half(model):
            halves = [model.decode(_rounded(one)) for one in latents]
    worst = max(peaks, key=lambda name: peaks[name])
    finite = all(bool(torch.isfinite(one).all()) for one in halves)
    return VaeRange(
        path=str(path),
        size=size,
        shapes=shapes,
        peaks=dict(peaks),
        worst=worst,
        peak=peaks[worst],
        fits=peaks[worst] <= HALF_MAX and finite,
        half_psnr_db=_psnr(whole, halves) if finite else -math.inf,
        half_finite=finite,
    )


def decoded_pictures(path: str | Path, *, size: int = 256) -> Tensor:
    """Decode the noise that `vae_range` uses, in float32: (B, H, W, 3)."""
    model, _ = _loaded(path, size)
    with torch.inference_mode():
        return torch.cat([to_pixels(model.decode(one)) for one in _noise(model, size)])


def _loaded(path: str | Path, size: int) -> tuple[AutoencoderKL, dict[str, tuple[int, ...]]]:
    if size < 64 or size % 64:
        raise UsageError(f"size {size}: expected a multiple of 64")
    with open_source(path) as source:
        part, logical = _part(source)
        hyper = {name: one.value for name, one in part.hyper.items()}
        weights = packed_weights(logical, part)
        model = build("vae_kl", weights, hyper)
    assert isinstance(model, AutoencoderKL)
    return model, {key: weight.shape for key, weight in weights.items()}


def _part(source: TensorSource) -> tuple[PartMatch, Any]:
    logical = bind(source)
    match = recognise_part(logical.specs(), source.metadata, source.configs)
    found = next((part for part in match.parts if part.name == "vae"), None)
    if found is None:
        raise UsageError(f"{source.path}: no autoencoder in it")
    if found.kind != "vae_kl":
        raise UnknownArchitecture(
            f"{source.path}: activations of {found.kind} are not measured, only those of vae_kl"
        )
    return found, logical


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, float]]:
    """The largest absolute output of every module that runs inside the context."""
    peaks: dict[str, float] = {}

    def note(name: str, output: Tensor) -> None:
        found = float(output.detach().abs().amax())
        peaks[name] = max(peaks.get(name, 0.0), found if math.isfinite(found) else math.inf)

    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: note(name, out))
        for name, module in model.named_modules()
        if name not in ("", "encoder", "decoder") and not isinstance(module, nn.ModuleList)
    ]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _half(model: nn.Module) -> Iterator[None]:
    """Round weights, and inside the context outputs, to float16; the weights stay so."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            weight = module.bound().dequantize(torch.float32)
            module.bind(_plain(_rounded(weight)))
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data)
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: _rounded(out))
        for module in model.modules()
        if not isinstance(module, nn.ModuleList)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(values: Tensor) -> Tensor:
    return values.half().float()


def _plain(weight: Tensor) -> PackedWeight:
    return PackedWeight((Segment("f32", tuple(weight.shape), {"weight": weight}),))


def _latents(model: AutoencoderKL, size: int) -> list[Tensor]:
    found = _noise(model, size)
    if model.encoder is not None and model.config.pixels == 3:
        found += [model.encode(picture)[0] for picture in _pictures(size)]
    return found


def _noise(model: AutoencoderKL, size: int) -> list[Tensor]:
    found = []
    side = size // model.config.factor
    for seed in _NOISE_SEEDS:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, model.config.latents, side, side), generator=generator)
        found.append(model.unscale(noise))
    return found


def _pictures(size: int) -> Iterator[Tensor]:
    from skimage import data

    for picture in (data.astronaut(), data.brick()):
        grey = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
        tiles = -(-size // grey.shape[0])
        cut = np.tile(grey, (tiles, tiles, 1))[:size, :size]
        pixels = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1)[None]
        yield pixels.float() / 127.5 - 1


def _psnr(whole: list[Tensor], halves: list[Tensor]) -> float | None:
    pooled = Pooled()
    for one, other in zip(whole, halves, strict=True):
        pooled.add(to_pixels(one).numpy(), to_pixels(other).numpy())
    return pooled.psnr_db
