"""The UNet of the Stable Diffusion family: LDM names are canonical.

Diffusers groups layers by resolution level (`down_blocks.1.resnets.0`), LDM numbers them through
(`input_blocks.4.0`). Neither needs a table of sizes: in Diffusers names the number of resnets per
level is visible, in LDM names a level ends with its resampling convolution.

    input_blocks.0    conv_in              output_blocks.n.0   resnet
    input_blocks.n.0  resnet, or .0.op     output_blocks.n.1   transformer, or .1.conv
    input_blocks.n.1  transformer          output_blocks.n.2   .2.conv after a transformer

Source: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_ldm_unet_checkpoint; Comfy-Org/ComfyUI@0b61ce5:comfy/model_detection.py, detect_unet_config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from diffquant.convert.architectures.base import (
    PREFIXES,
    Component,
    Facts,
    Keep,
    Layout,
    Signature,
)
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "FAMILY_V", "FFN_DOWN", "KEEP", "component"]

# UNet2DConditionModel fields on which every member of the family agrees.
DEFAULTS: Mapping[str, object] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
}

_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_COMFY = "Comfy-Org/ComfyUI@0b61ce5:comfy/model_detection.py, detect_unet_config"
KEEP = (
    Keep(r"^time_embed\.", "timestep embedding", _CG, frees=True),
    Keep(r"^label_emb\.", "size and pooled text embedding, and detection reads its width", _CG),
    Keep(r"^input_blocks\.0\.0\.weight$", "input convolution, and detection reads its width", _CG),
    Keep(r"^out\.2\.weight$", "output convolution", _CG),
)
FAMILY_V = r"\.to_v\.weight$"
FFN_DOWN = r"\.ff\.net\.2\.weight$"

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.attentions.0": "middle_block.1",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # latent consistency models
    "encoder_hid_proj": "encoder_hid_proj",  # Kolors
}
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_IMAGE_CLASS = {
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
# Relatives that are other models: upscalers by noise level (a class table), motion and video
# (temporal layers, a transformer at the input), sound (several attentions per resnet).
_FOREIGN_LDM = (
    "input_hint_block.",
    "zero_convs.",
    "label_emb.weight",
    "input_blocks.0.1.",
    "input_blocks.1.0.time_",
)
_DEEPER = ("input_blocks.4.1.transformer_blocks.1.", "input_blocks.7.1.transformer_blocks.1.")
_FOREIGN = (
    "controlnet_",
    "transformer_in.",
    "down_blocks.0.temp_convs.",
    "down_blocks.0.motion_modules.",
    "down_blocks.1.motion_modules.",
    "down_blocks.0.attentions.2.",
    "down_blocks.1.attentions.2.",
)
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}


class _Layer(NamedTuple):
    """A resnet (perhaps with a transformer), or a resampling convolution."""

    level: int
    resnet: int  # within the level
    block: int  # LDM number
    resample: str = ""  # LDM name below the block


def _links(shapes: Shapes, layout: Layout, *, image_class: bool = False) -> list[Link]:
    links = rename_table({**_TOP, **(_IMAGE_CLASS if image_class else _ADDED)})
    for theirs, ours in _MIDDLE.items():
        links += rename_table(_RESNET, f"{theirs}.", f"{ours}.")
    walk = _walk_ldm if layout == "canonical" else _walk_diffusers
    for side, blocks in (("down", "input_blocks"), ("up", "output_blocks")):
        for level, index, block, resample in walk(shapes, side):
            theirs, ours = f"{side}_blocks.{level}", f"{blocks}.{block}"
            if resample:
                conv = f"{theirs}.{side}samplers.0.conv"
                links.append(Link((conv,), f"{ours}.{resample}"))
            else:
                links += rename_table(_RESNET, f"{theirs}.resnets.{index}.", f"{ours}.0.")
                links.append(Link((f"{theirs}.attentions.{index}",), f"{ours}.1"))
    return links


def _walk_diffusers(shapes: Shapes, side: str) -> Iterator[_Layer]:
    block = 1 if side == "down" else 0
    for level in range(count(shapes, f"{side}_blocks")):
        name = f"{side}_blocks.{level}"
        resnets = count(shapes, f"{name}.resnets")
        for index in range(resnets):
            yield _Layer(level, index, block)
            block += 1
        if f"{name}.{side}samplers.0.conv.weight" not in shapes:
            continue
        if side == "down":  # a block of its own
            yield _Layer(level, 0, block, "0.op")
            block += 1
        else:  # the last layer of the level's last block
            last = f"{name}.attentions.{resnets - 1}.norm.weight"
            yield _Layer(level, 0, block - 1, "2.conv" if last in shapes else "1.conv")


def _walk_ldm(shapes: Shapes, side: str) -> Iterator[_Layer]:
    blocks = "input_blocks" if side == "down" else "output_blocks"
    names = ("0.op",) if side == "down" else ("1.conv", "2.conv")
    level = index = 0
    for block in range(1 if side == "down" else 0, count(shapes, blocks)):
        if f"{blocks}.{block}.0.in_layers.0.weight" in shapes:
            yield _Layer(level, index, block)
            index += 1
        for name in names:
            if f"{blocks}.{block}.{name}.weight" in shapes:
                yield _Layer(level, 0, block, name)
                level, index = level + 1, 0


def _facts(shapes: Shapes) -> Facts:
    levels, ups = count(shapes, "down_blocks"), count(shapes, "up_blocks")
    depths = [_depth(shapes, f"down_blocks.{i}") for i in range(levels)]
    up_depths = [_depth(shapes, f"up_blocks.{i}") for i in range(ups)]
    middle = count(shapes, "mid_block.attentions.0.transformer_blocks")
    first = next((i for i, depth in enumerate(depths) if depth), 0)
    attention = f"down_blocks.{first}.attentions.0"
    added = width(shapes, "add_embedding.linear_1.weight", 1)
    projection = shapes.get(f"{attention}.proj_in.weight", ())
    middles = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
    facts: Facts = {
        "mid_block_type": middles[min(count(shapes, "mid_block.resnets"), 2)],
        "in_channels": width(shapes, "conv_in.weight", 1),
        "out_channels": width(shapes, "conv_out.weight", 0),
        "block_out_channels": tuple(
            width(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)
        ),
        "layers_per_block": count(shapes, "down_blocks.0.resnets"),
        "cross_attention_dim": width(
            shapes, f"{attention}.transformer_blocks.0.attn2.to_k.weight", 1
        ),
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths),
        "use_linear_projection": len(projection) == 2,
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up_depths
        ),
        "_levels": levels,
        "_middle": count(shapes, "mid_block.resnets"),
        "_middle_depth": middle,
        "_first_attention": bool(depths) and depths[0] > 0,
        "_deepest_attention": bool(depths) and depths[-1] > 0,
        "_depths": tuple(depths),
        "_added": added is not None,
        "_generation": _generation(shapes, f"{attention}.transformer_blocks.0", projection),
        "_self_attention": f"{attention}.transformer_blocks.0.attn1.to_q.weight" in shapes,
        "_guided": "time_embedding.cond_proj.weight" in shapes,
        "_width": width(shapes, "conv_in.weight", 0),
    }
    if facts["_guided"]:
        facts["time_cond_proj_dim"] = width(shapes, "time_embedding.cond_proj.weight", 1)
    if image := width(shapes, "class_embedding.linear_1.weight", 1):
        facts["class_embed_type"] = "projection"
        facts["projection_class_embeddings_input_dim"] = image
    if "encoder_hid_proj.weight" in shapes:
        facts["encoder_hid_dim"] = width(shapes, "encoder_hid_proj.weight", 1)
    if added is not None:
        facts["addition_embed_type"] = "text_time"
        facts["projection_class_embeddings_input_dim"] = added
    return facts


def _generation(shapes: Shapes, block: str, projection: tuple[int, ...]) -> int:
    """1 or 2, by the width of the text context: CLIP-L's or OpenCLIP-H's; 0 for other models.

    Without a text context it is no text to image model, and 1280 is Bert's in the older latent
    diffusion. Other widths are no published model's; there the kind of projection decides.
    """
    context = width(shapes, f"{block}.attn2.to_k.weight", 1)
    known = {None: 0, 768: 1, 1024: 2, 1280: 0}
    return known.get(context, 2 if len(projection) == 2 else 1)


def _depth(shapes: Shapes, block: str) -> int:
    """Transformer blocks per attention of a level; where attentions differ, of the first."""
    return count(shapes, f"{block}.attentions.0.transformer_blocks")


_links_of_unclip = partial(_links, image_class=True)


def component(
    where: Mapping[str, tuple[object, ...]],
    *,
    text_projection: bool = False,
    image_class: bool = False,
) -> Component:
    """The denoiser component, for the members of the family whose facts fit `where`.

    Args:
        where: facts that part it from its relatives.
        text_projection: whether text passes a projection of its own first (Kolors).
        image_class: whether the embedding of an image is added to the timestep's (SD2 unCLIP).
    """
    image = ("class_embedding.linear_1.weight",) if image_class else ()
    projection = ("encoder_hid_proj.weight",) if text_projection else ()
    foreign = () if text_projection else ("encoder_hid_proj.",)
    return Component(
        name="denoiser",
        kind="unet_unclip" if image_class else "unet_ldm",
        folder="unet",
        prefixes=PREFIXES,
        signatures={
            "canonical": Signature(
                (
                    "input_blocks.0.0.weight",
                    "input_blocks.1.0.in_layers.2.weight",
                    "output_blocks.0.0.in_layers.2.weight",
                    "time_embed.0.weight",
                    "time_embed.2.weight",
                    "out.0.weight",
                    "out.2.weight",
                    *projection,
                    *(("label_emb.0.0.weight",) if image_class else ()),
                ),
                (*foreign, *_FOREIGN_LDM, *(_DEEPER if image_class else ())),
            ),
            "diffusers": Signature(
                (
                    "conv_in.weight",
                    "conv_out.weight",
                    "conv_norm_out.weight",
                    "time_embedding.linear_1.weight",
                    "time_embedding.linear_2.weight",
                    "down_blocks.0.resnets.0.conv1.weight",
                    "down_blocks.0.resnets.0.time_emb_proj.weight",
                    "up_blocks.0.resnets.0.time_emb_proj.weight",
                    *projection,
                    *image,
                ),
                (*foreign, *_FOREIGN, *(() if image_class else ("class_embedding.",))),
            ),
        },
        links=_links_of_unclip if image_class else _links,  # one object: answers are shared
        facts=_facts,
        where=where,
    )
