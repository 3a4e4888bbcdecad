"""The KL autoencoder of the SD family and Flux: LDM names are canonical.

Three differences to Diffusers: its decoder counts up blocks from the other end, its mid attention
is linear where LDM has a 1x1 convolution, and before 0.18 it named that attention query, key, value
and proj_attn (huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_ldm_vae_checkpoint; src/diffusers/models/modeling_utils.py,
_convert_deprecated_attention_blocks).
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Latent, Layout, Signature
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "FLUX1_DEFAULTS", "FLUX1_LATENT", "SDXL_DEFAULTS", "component"]

# stabilityai/sdxl-vae config.json, which SD1.5's agrees with where both name a field.
DEFAULTS: Mapping[str, object] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "norm_num_groups": 32,
    "layers_per_block": 2,
}
SDXL_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
# black-forest-labs/FLUX.1-dev vae/config.json; other makers took this autoencoder as it is.
FLUX1_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX1_LATENT = Latent(16, 8, 0.3611, 0.1159, patch=2, space="flux1")  # 2 x 2 pixels a token

_TOP = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.resnets.0.conv_shortcut": "mid.block_1.nin_shortcut",
    "mid_block.resnets.1.conv_shortcut": "mid.block_2.nin_shortcut",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
}
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_SIDES = (("encoder.", "down", "downsample"), ("decoder.", "up", "upsample"))


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    canonical = layout == "canonical"
    links = [Link((one,), one) for one in ("quant_conv", "post_quant_conv")]
    for side, direction, resample in _SIDES:
        links += rename_table(_TOP, side, side)
        theirs, ours = f"{side}mid_block.attentions.0.", f"{side}mid.attn_1."
        old = f"{theirs}query.weight" in shapes
        for a, b in (_OLD_ATTENTION if old else _ATTENTION).items():
            links.append(Link((theirs + a,), ours + b, "conv1x1"))
        levels = count(shapes, f"{side}{direction}" if canonical else f"{side}{direction}_blocks")
        for i in range(levels):
            level = levels - 1 - i if direction == "up" else i
            theirs, ours = f"{side}{direction}_blocks.{i}.", f"{side}{direction}.{level}."
            resnets = count(shapes, f"{ours}block" if canonical else f"{theirs}resnets")
            for j in range(resnets):
                a, b = f"{theirs}resnets.{j}", f"{ours}block.{j}"
                links.append(Link((a,), b))
                links.append(Link((f"{a}.conv_shortcut",), f"{b}.nin_shortcut"))
            links.append(Link((f"{theirs}{resample}rs.0.conv",), f"{ours}{resample}.conv"))
    return links


def _facts(shapes: Shapes) -> Facts:
    levels = count(shapes, "encoder.down_blocks")
    return {
        "in_channels": width(shapes, "encoder.conv_in.weight", 1),
        "out_channels": width(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": width(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": tuple(
            width(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0)
            for i in range(levels)
        ),
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets"),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * count(shapes, "decoder.up_blocks"),
        "mid_block_add_attention": "decoder.mid_block.attentions.0.group_norm.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def component(prefixes: tuple[str, ...]) -> Component:
    """The vae component, at these prefixes in single files."""
    both = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    foreign = (
        "bn.",
        "quantize.",
        "encoder.temp_conv_in.",  # Allegro's, of videos
        "decoder.time_conv_out.",
        "decoder.mid.attn_1.norm.gamma",
    )
    return Component(
        name="vae",
        kind="vae_kl",
        folder="vae",
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                (
                    *both,
                    "decoder.norm_out.weight",
                    "decoder.mid.block_1.conv1.weight",
                    "decoder.up.0.block.0.conv1.weight",
                ),
                foreign,
            ),
            "diffusers": Signature(
                (
                    *both,
                    "decoder.conv_norm_out.weight",
                    "decoder.mid_block.resnets.0.conv1.weight",
                    "decoder.up_blocks.0.resnets.0.conv1.weight",
                ),
                foreign,
            ),
        },
        links=_links,
        facts=_facts,
        ignored=(
            (r"^loss\.", "training loss, not part of the model"),
            (r"^model_ema\.", "EMA copy"),
        ),
    )
