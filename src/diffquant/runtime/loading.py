"""Build a model around packed weights.

The modules of a model are named by the canonical keys, so binding is a walk: each packed layer
takes its weight as it is, and small parameters (norms, biases) are decoded to the compute dtype.
The model is built without allocating any large weight; key sets must match exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from diffquant.convert.architectures.base import Layout
from diffquant.core.errors import (
    MissingKeys,
    UnknownFormat,
    UnmappedKeys,
    UnsupportedShape,
    shorten,
)
from diffquant.runtime.layers import PackedLayer, PackedWeight
from diffquant.runtime.models import (
    clip,
    flux,
    flux2,
    qwen_image,
    qwen_text,
    t5,
    taesd,
    unet,
    vae_flux2,
    vae_kl,
    vae_qwen,
    z_image,
)
from diffquant.runtime.models.facts import Hyper, Shapes
from diffquant.runtime.stored import StoredWeight

__all__ = ["MODELS", "ModelRow", "Weights", "bind", "build", "model_for", "outline"]

Weights: TypeAlias = Mapping[str, PackedWeight | StoredWeight]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One kind of model: how its config is read, and the module built from it.

    Attributes:
        config_from: (shapes by key, config fields) -> the model's config.
        module: config -> module.
        kinds: part kinds it serves, as convert/architectures names them.
        layout: whose names its modules carry.
        unread: patterns of keys that such a part may hold and that making pictures needs none of;
            they are not loaded. Any other key too many is an error.
    """

    config_from: Callable[[Shapes, Hyper], Any]
    module: Callable[[Any], nn.Module]
    kinds: tuple[str, ...]
    layout: Layout = "canonical"
    unread: tuple[str, ...] = ()

    def reads(self, key: str) -> bool:
        """Whether the model takes the weight at `key`, if it is there."""
        return not any(re.search(pattern, key) for pattern in self.unread)


MODELS: Mapping[str, ModelRow] = {
    "unet": ModelRow(unet.config_from, unet.UNet, ("unet_ldm",)),
    "flux": ModelRow(flux.config_from, flux.Flux, ("flux",)),
    "flux2": ModelRow(flux2.config_from, flux2.Flux2, ("flux2",)),
    "z_image": ModelRow(z_image.config_from, z_image.ZImage, ("z_image",)),
    "clip": ModelRow(clip.config_from, clip.ClipText, ("clip_text",)),
    # open_clip fuses q, k and v as bare parameters: read by transformers' names instead.
    "open_clip": ModelRow(clip.config_from, clip.ClipText, ("openclip_text",), "diffusers"),
    "t5": ModelRow(t5.config_from, t5.T5Encoder, ("t5_encoder",)),
    "vae_kl": ModelRow(vae_kl.config_from, vae_kl.AutoencoderKL, ("vae_kl",)),
    "qwen_image": ModelRow(
        qwen_image.config_from,
        qwen_image.QwenImage,
        ("qwen_image",),
        unread=("^__index_timestep_zero__$",),  # ComfyUI's mark of Edit-2511, no weight
    ),
    "qwen_text": ModelRow(
        qwen_text.config_from,
        qwen_text.QwenText,
        ("qwen2_vl_text", "qwen3_text"),
        unread=(r"^lm_head\.", r"^visual\."),  # words are not predicted, pictures not read
    ),
    "vae_qwen": ModelRow(
        vae_qwen.config_from,
        vae_qwen.QwenVae,
        ("vae_qwen",),
        unread=(r"\.time_conv\.",),  # they join frames, a picture is one
    ),
    "vae_flux2": ModelRow(
        vae_flux2.config_from,
        vae_flux2.AutoencoderFlux2,
        ("vae_flux2",),
        unread=(r"^bn\.num_batches_tracked$",),  # a count of training steps
    ),
    "taesd": ModelRow(
        taesd.config_from,
        taesd.Taesd,
        ("vae_tiny", "vae_tiny_encoder", "vae_tiny_decoder"),
    ),
}


def model_for(part_kind: str) -> str | None:
    """The model kind that serves a part of this kind, None where the runtime has none."""
    return next((name for name, row in MODELS.items() if part_kind in row.kinds), None)


def build(
    model_kind: str,
    weights: Weights,
    hyper: Hyper,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Build the model `model_kind` (a key of MODELS) and bind `weights`.

    Args:
        model_kind: a key of MODELS.
        weights: part-local key, in the row's layout, to packed weight, vectors included; weights
            of layers that are still stored stay so, until a home brings them.
        hyper: what shapes cannot say, as config.json fields; see the model's `config_from`.
        dtype: compute dtype; packed weights are decoded to it call by call.
        device: where weights and parameters go.

    Raises:
        MissingKeys, UnmappedKeys: the key set is not the model's; every offender is carried.
        UnsupportedShape: a tensor has another shape than its neighbours imply.
    """
    if model_kind not in MODELS:
        raise UnknownFormat(model_kind, MODELS, what="model kind")
    row = MODELS[model_kind]
    taken: Weights = {key: weight for key, weight in weights.items() if row.reads(key)}
    config = row.config_from({key: outline(weight).shape for key, weight in taken.items()}, hyper)
    model = row.module(config).to(dtype)
    bind(model, taken, label=model_kind)
    return model.requires_grad_(False).eval().to(device)


def outline(weight: PackedWeight | StoredWeight) -> PackedWeight:
    """The weight for its shape and formats; its numbers may still be in the file."""
    return weight.outline if isinstance(weight, StoredWeight) else weight


def bind(model: nn.Module, weights: Weights, *, label: str) -> None:
    """Give every packed layer its weight and every small parameter its values; see `build`."""
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer)
    }
    parameters = dict(model.named_parameters())
    expected = layers.keys() | parameters.keys()
    if missing := sorted(expected - weights.keys()):
        raise MissingKeys(f"{label}: missing {shorten(missing)}", keys=tuple(missing))
    if unknown := sorted(weights.keys() - expected):
        raise UnmappedKeys(f"{label}: unexpected {shorten(unknown)}", keys=tuple(unknown))
    for key, layer in layers.items():
        weight = weights[key]
        try:
            if isinstance(weight, StoredWeight):
                layer.bind_stored(weight)
            else:
                layer.bind(weight)
        except UnsupportedShape as error:
            raise UnsupportedShape(f"{label}: {key}: {error}") from None
    for key, parameter in parameters.items():
        weight = weights[key]
        if outline(weight).shape != tuple(parameter.shape):
            found = f"expected shape {tuple(parameter.shape)}, found {outline(weight).shape}"
            raise UnsupportedShape(f"{label}: {key}: {found}")
        loaded = weight.load() if isinstance(weight, StoredWeight) else weight
        parameter.data = loaded.dequantize(parameter.dtype)
