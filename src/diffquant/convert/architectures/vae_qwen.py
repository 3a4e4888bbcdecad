"""Qwen-Image's autoencoder (Wan 2.1's, fine-tuned): Diffusers names are canonical.

Single files in circulation have Wan's own names, which are read as an alternate naming:

    encoder.downsamples.n  encoder.down_blocks.n     flat in both
    decoder.upsamples.n    decoder.up_blocks.i       .resnets.j, then .upsamplers.0

Source: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_wan_vae_to_diffusers; it writes block numbers down, here a level ends with its resampling.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "component"]

# huggingface/diffusers@58eb52c:
# src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py, class defaults
DEFAULTS: Mapping[str, object] = {
    "_class_name": "AutoencoderKLQwenImage",
    "num_res_blocks": 2,
    "attn_scales": (),
    "dropout": 0.0,
    "latents_mean": (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    "latents_std": (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ),
}

_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_SIDE = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.1": "mid_block.attentions.0",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table({"conv1": "quant_conv", "conv2": "post_quant_conv"})
    for side in ("encoder.", "decoder."):
        links += rename_table(_SIDE, side, side)
        for theirs, ours in (("middle.0.", "resnets.0."), ("middle.2.", "resnets.1.")):
            links += rename_table(_BLOCK, side + theirs, f"{side}mid_block.{ours}")
    for n in range(count(shapes, "encoder.downsamples")):
        theirs, ours = f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
        links += [Link((theirs,), ours), *rename_table(_BLOCK, f"{theirs}.", f"{ours}.")]
    level = index = 0
    for n in range(count(shapes, "decoder.upsamples")):
        theirs = f"decoder.upsamples.{n}"
        if f"{theirs}.resample.1.weight" in shapes:
            links.append(Link((theirs,), f"decoder.up_blocks.{level}.upsamplers.0"))
            level, index = level + 1, 0
        else:
            ours = f"decoder.up_blocks.{level}.resnets.{index}."
            links += rename_table(_BLOCK, f"{theirs}.", ours)
            index += 1
    return links


def _facts(shapes: Shapes) -> Facts:
    base = width(shapes, "encoder.conv_in.bias", 0)
    levels = count(shapes, "decoder.up_blocks")
    widths = [
        width(shapes, f"decoder.up_blocks.{i}.resnets.0.conv1.bias", 0) for i in range(levels)
    ]
    resamples = [f"decoder.up_blocks.{i}.upsamplers.0" for i in range(levels - 1)]
    temporal = tuple(f"{one}.time_conv.weight" in shapes for one in reversed(resamples))
    return {
        "base_dim": base,
        # By biases: stable-diffusion.cpp's GGUF files merge the first two axes of weights.
        "z_dim": width(shapes, "post_quant_conv.bias", 0),
        "input_channels": width(shapes, "decoder.conv_out.bias", 0),
        "dim_mult": tuple(one // base for one in reversed(widths) if one and base),
        "temperal_downsample": temporal,  # the config's own spelling
    }


def component(prefixes: tuple[str, ...]) -> Component:
    """The vae component, at these prefixes in single files."""
    return Component(
        name="vae",
        kind="vae_qwen",
        folder="vae",
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                (
                    "encoder.conv_in.weight",
                    "decoder.conv_in.weight",
                    "decoder.norm_out.gamma",
                    "decoder.mid_block.attentions.0.to_qkv.weight",
                    "decoder.up_blocks.0.resnets.0.norm1.gamma",
                    "post_quant_conv.weight",
                ),
                ("encoder.down_blocks.0.resnets.",),  # Wan 2.2's
            ),
            "alternate": Signature(
                (
                    "conv1.weight",
                    "conv2.weight",
                    "encoder.conv1.weight",
                    "decoder.conv1.weight",
                    "decoder.middle.0.residual.0.gamma",
                    "decoder.upsamples.0.residual.0.gamma",
                )
            ),
        },
        links=_links,
        facts=_facts,
        same_names=True,
    )
