"""Which dtype a run computes in, and what is done when it overflows.

float16 ends at 65504: the VAE of SDXL and some denoisers go beyond it, and the picture comes out
black or as NaN. The part that overflowed is run again in float32, once, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffquant.core.errors import UnknownFormat, VerificationError
from diffquant.runtime.devices import native_dtype
from diffquant.runtime.inpaint import paste
from diffquant.runtime.judges import defects
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.pipeline import Denoised, OnLatents, OnStep, Pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["DTYPES", "Hooks", "chosen_dtype", "decode_finite", "denoise_finite", "slow_here"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What is told on the way.

    Attributes:
        on_phase: "encode", "denoise" or "decode" begins, with its number of steps.
        on_step, on_latents: as of Pipeline.denoise.
        warn: a sentence for people.
    """

    on_phase: Callable[[str, int], None] = lambda _name, _steps: None
    on_step: OnStep | None = None
    on_latents: OnLatents | None = None
    warn: Callable[[str], None] = lambda _text: None


def chosen_dtype(name: str, device: str) -> str:
    """Resolve "auto": the narrowest dtype that the device multiplies natively.

    Raises:
        UnknownFormat: no dtype.
    """
    if name == "auto":
        return str(native_dtype(device)).removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownFormat(name, ("auto", *DTYPES), what="dtype")
    return name


def slow_here(dtype: str, device: str) -> Iterator[str]:
    """Say so where a dtype is far slower than the others."""
    if dtype == "float16" and device == "cpu":
        yield (
            "float16 is extremely slow on processors, which have no arithmetic for it: use "
            "--dtype auto"
        )


def denoise_finite(
    pipeline: Pipeline,
    request: PictureRequest,
    *,
    latents: Tensor | None = None,
    hooks: Hooks | None = None,
) -> Denoised:
    """Walk to latents; where they are not finite, once more with the denoiser in float32.

    Raises:
        VerificationError: they are not finite in float32 either.
    """
    hooks = hooks or Hooks()

    def walk() -> Denoised:
        hooks.on_phase("encode", 1)
        return pipeline.denoise(
            request,
            latents=latents,
            on_step=hooks.on_step,
            on_latents=hooks.on_latents,
            on_start=lambda calls: hooks.on_phase("denoise", calls),
        )

    denoiser = pipeline.parts.denoiser
    try:
        return walk()
    except VerificationError as error:
        if param_dtype(denoiser) == torch.float32:
            raise
        hooks.warn(f"{error}: the denoiser overflowed in {_name(denoiser)}, run again in float32")
        with _in_float32(denoiser):
            return walk()


def decode_finite(
    pipeline: Pipeline, request: PictureRequest, latents: Tensor, hooks: Hooks | None = None
) -> Tensor:
    """Decode latents; what is not finite, or black, once more with the VAE in float32.

    Returns:
        (B, H, W, 3) float32 in [0, 1], what a mask protects put back.

    Raises:
        VerificationError: not finite in float32 either.
    """
    hooks = hooks or Hooks()
    hooks.on_phase("decode", 1)
    vae = pipeline.parts.vae
    images = pipeline.decode(latents)
    if param_dtype(vae) != torch.float32 and _broken(images):
        lower = _name(vae)
        with _in_float32(vae):
            again = pipeline.decode(latents)
        # black in float32 too is a picture of the night
        if not _broken(again) or not bool(torch.isfinite(images).all()):
            hooks.warn(f"the VAE overflowed in {lower}, the picture was decoded again in float32")
            images = again
    if not bool(torch.isfinite(images).all()):
        raise VerificationError("the decoded picture is not finite, in float32 either")
    return paste(request, images)


def _broken(images: Tensor) -> bool:
    odd = {word for image in images for word in defects(image.numpy())}
    return bool(odd & {"not finite", "black"})


def _name(module: nn.Module) -> str:
    return str(param_dtype(module)).removeprefix("torch.")


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Compute in float32 for a while; packed weights are decoded to it call by call."""
    before = param_dtype(module)
    module.to(torch.float32)
    try:
        yield
    finally:
        module.to(before)
