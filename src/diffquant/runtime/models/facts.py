"""What a model file asks before it builds itself: shapes by key, and facts shapes cannot say.

`shapes` maps canonical part-local keys to shapes. `hyper` uses the field names of diffusers' and
transformers' config.json; a field that is absent or null takes the default given by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import ArchitectureError, MissingKeys

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Hyper",
    "Shapes",
    "activation",
    "count",
    "guidance_embedding",
    "number",
    "param_dtype",
    "per_level",
    "require",
    "rotary_axes",
    "shape_of",
    "timestep_embedding",
]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Hyper: TypeAlias = Mapping[str, Any]


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, called gelu_new by transformers."""
    return functional.gelu(x, approximate="tanh")


Activation: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": quick_gelu,
    "gelu": functional.gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_tanh": tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


def activation(name: str) -> str:
    """Check an activation's name.

    Raises:
        ArchitectureError: a name ACTIVATIONS has no row for.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ArchitectureError(f"unknown activation {name!r} (known: {known})")
    return name


def shape_of(shapes: Shapes, key: str) -> tuple[int, ...]:
    """Shape of `key`.

    Raises:
        MissingKeys: the part has no such key.
    """
    try:
        return tuple(shapes[key])
    except KeyError:
        raise MissingKeys(f"missing key {key!r}", keys=(key,)) from None


def count(shapes: Shapes, prefix: str) -> int:
    """Length of the module list at `prefix`: the number of consecutive indices from 0."""
    head = f"{prefix}."
    found = {key[len(head) :].split(".", 1)[0] for key in shapes if key.startswith(head)}
    index = 0
    while str(index) in found:
        index += 1
    return index


def number(hyper: Hyper, name: str, default: float) -> float:
    """A numeric field, or its default."""
    value = hyper.get(name)
    return default if value is None else float(value)


def per_level(value: Any, level: int) -> int:  # noqa: ANN401 (a json value: int, or one int per level)
    """An integer given once, or once per resolution level."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return int(value[level])
    return int(value)


def rotary_axes(
    hyper: Hyper, name: str, default: tuple[int, ...], head_dim: int
) -> tuple[int, ...]:
    """How many numbers of a head each axis of positions turns.

    Raises:
        ArchitectureError: they do not fill a head.
    """
    axes = tuple(int(axis) for axis in hyper.get(name) or default)
    if sum(axes) != head_dim:
        raise ArchitectureError(f"rotary axes {axes} do not add up to the head width {head_dim}")
    return axes


def require(hyper: Hyper, name: str, supported: Sequence[object]) -> None:
    """Refuse a field whose value this runtime does not implement; absent and null are fine.

    Raises:
        ArchitectureError: the value is none of `supported`.
    """
    value = hyper.get(name)
    if value is not None and value not in supported:
        listed = ", ".join(map(repr, supported))
        raise ArchitectureError(f"config field {name} is {value!r}, the runtime supports {listed}")


def param_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a model computes in: that of its small parameters."""
    return next(module.parameters()).dtype


def timestep_embedding(t: Tensor, width: int, scale: float = 1.0) -> Tensor:
    """Sinusoids of `scale * t` (B,): float32 (B, width), cosines first.

    Angles are multiplied by `scale` last: at angles of 1000, another order is another number.
    Source: CompVis/stable-diffusion ldm/modules/diffusionmodules/util.py timestep_embedding; the
    same as diffusers get_timestep_embedding with flip_sin_to_cos=True, downscale_freq_shift=0.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(steps * (-torch.log(torch.tensor(10000.0)).item() / half))
    angles = t.float()[:, None] * frequencies * scale
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 * (guidance - 1), guidance (B,): float32 (B, width), sines first.

    A strength of 1 is no guidance: distillation counted from there. Source:
    huggingface/diffusers@58eb52c:src/diffusers/pipelines/latent_consistency_models/
    pipeline_latent_consistency_text2img.py get_guidance_scale_embedding, __call__.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=guidance.device)
    frequencies = torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    angles = (guidance.float() - 1)[:, None] * 1000 * frequencies
    found = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return functional.pad(found, (0, width % 2))
