"""The autoencoder an architecture is published with, for files that hold none.

All KL autoencoders in use have four levels of 128, 256, 512 and 512 channels; Wan's has four of 96,
192, 384 and 384 (huggingface/diffusers@58eb52c: src/diffusers/models/autoencoders/
autoencoder_kl_wan.py). Counts of weights: names and shapes of stabilityai/sd-vae-ft-mse,
black-forest-labs/FLUX.1-dev and FLUX.2-dev, Qwen/Qwen-Image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffquant.convert.footprint.moments import Buffer
from diffquant.convert.footprint.weights import PartWeights
from diffquant.convert.rules import Shape, Shapes

__all__ = ["UsualVae", "usual_vae"]

_HALF = 2
_KL_LEVELS = ((256, 128), (512, 256), (512, 512), (512, 512))  # (in, out), finest first
_KL_BLOCKS = 3
_WAN_LEVELS = ((384, 384), (192, 384), (192, 192), (96, 96))  # (in, out), coarsest first


@dataclass(frozen=True, slots=True)
class UsualVae:
    """Shapes of a decoder, as far as its activations follow from them, and the file's weights."""

    shapes: Shapes
    parameters: int
    largest: int

    @property
    def weights(self) -> PartWeights:
        """Encoder and decoder, in 16 bits."""
        largest = Buffer("a convolution", self.largest * _HALF)
        nothing = Buffer("nothing to decode", 0)
        return PartWeights(self.parameters * _HALF, 0, 0, (), largest, nothing)


def usual_vae(kind: str, channels: int) -> UsualVae:
    """The autoencoder of a kind with so many latent channels."""
    return _MADE[kind](channels)


def _kl(channels: int, parameters: int) -> UsualVae:
    shapes: dict[str, Shape] = {
        "decoder.conv_in.weight": (512, channels, 3, 3),
        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    }
    for name in ("decoder.mid.block_1", "decoder.mid.block_2"):
        shapes[f"{name}.conv1.weight"] = (512, 512, 3, 3)
    for level, (before, after) in enumerate(_KL_LEVELS):
        for index in range(_KL_BLOCKS):
            name = f"decoder.up.{level}.block.{index}"
            first = before if index == 0 else after
            shapes[f"{name}.conv1.weight"] = (after, first, 3, 3)
            if first != after:
                shapes[f"{name}.nin_shortcut.weight"] = (after, first, 1, 1)
        if level:
            shapes[f"decoder.up.{level}.upsample.conv.weight"] = (after, after, 3, 3)
    return UsualVae(shapes, parameters, 512 * 512 * 9)


def _wan(channels: int) -> UsualVae:
    widest = _WAN_LEVELS[0][1]
    shapes: dict[str, Shape] = {"decoder.conv_in.weight": (widest, channels, 3, 3, 3)}

    def resnet(name: str, before: int, after: int) -> None:
        shapes[f"{name}.conv1.weight"] = (after, before, 3, 3, 3)
        shapes[f"{name}.conv2.weight"] = (after, after, 3, 3, 3)
        if before != after:
            shapes[f"{name}.conv_shortcut.weight"] = (after, before, 1, 1, 1)

    for index in range(2):
        resnet(f"decoder.mid_block.resnets.{index}", widest, widest)
    for level, (before, after) in enumerate(_WAN_LEVELS):
        block = f"decoder.up_blocks.{level}"
        for index in range(_KL_BLOCKS):
            resnet(f"{block}.resnets.{index}", before if index == 0 else after, after)
        if level + 1 < len(_WAN_LEVELS):
            shapes[f"{block}.upsamplers.0.resample.1.weight"] = (after // 2, after, 3, 3)
    shapes["decoder.conv_out.weight"] = (3, _WAN_LEVELS[-1][1], 3, 3, 3)
    return UsualVae(shapes, 126_892_531, widest * widest * 27)


_MADE: Mapping[str, Callable[[int], UsualVae]] = {
    "vae_kl": lambda channels: _kl(channels, 83_653_863 if channels == 4 else 83_819_683),
    "vae_flux2": lambda channels: _kl(channels, 84_046_372),
    "vae_qwen": _wan,
}
