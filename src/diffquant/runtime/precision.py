"""Which dtype a run computes in, and what is done when it overflows.

float16 ends at 65504: the VAE of SDXL and some denoisers go beyond it, and the picture comes out
black or as NaN. The part that overflowed is run again in float32, once, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffquant.core.errors import UnknownFormat, VerificationError
from diffquant.runtime.judges import defects
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.pipeline import Generated, OnLatents, OnPhase, OnStep, Pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["DTYPES", "chosen_dtype", "run_finite", "slow_here"]

DTYPES = ("float32", "bfloat16", "float16")


def chosen_dtype(name: str, device: str) -> str:
    """Resolve "auto": bfloat16 where the device multiplies it natively, else float32.

    Raises:
        UnknownFormat: no dtype.
    """
    if name == "auto":
        return "bfloat16" if _native_bfloat16(device) else "float32"
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


def _native_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def run_finite(
    pipeline: Pipeline,
    request: PictureRequest,
    *,
    latents: Tensor | None,
    on_step: OnStep,
    on_latents: OnLatents | None,
    on_phase: OnPhase,
    warn: Callable[[str], None],
) -> Generated:
    """Run a request; what is not finite, or black, is run again in float32, once.

    Raises:
        VerificationError: latents or pictures that are not finite in float32 either.
    """

    def run() -> Generated:
        return pipeline.run(
            request, latents=latents, on_step=on_step, on_latents=on_latents, on_phase=on_phase
        )

    denoiser, vae = pipeline.parts.denoiser, pipeline.parts.vae
    try:
        made = run()
    except VerificationError as error:
        if param_dtype(denoiser) == torch.float32:
            raise
        warn(f"{error}: the denoiser overflowed in {_name(denoiser)}, run again in float32")
        with _in_float32(denoiser):
            made = run()
    if param_dtype(vae) == torch.float32 or not _broken(made.images):
        return _checked(made)
    lower = _name(vae)
    on_phase("decode", 1)
    with _in_float32(vae):
        images = pipeline.decode(made.latents)
    if torch.isfinite(made.images).all() and _broken(images):
        return made  # black in float32 too: it is a picture of the night
    warn(f"the VAE overflowed in {lower}, the picture was decoded again in float32")
    return _checked(Generated(images, made.latents, made.sampler, made.calls, made.truncated))


def _checked(made: Generated) -> Generated:
    if not bool(torch.isfinite(made.images).all()):
        raise VerificationError("the decoded picture is not finite, in float32 either")
    return made


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
