"""What a Qwen-Image transformer holds, read from its keys, which are Diffusers'.

What shapes cannot say: `zero_cond_t` (Edit-2511) shows other pictures to the modulation at time 0,
for they hold no noise; `use_layer3d_rope` (Layered) puts the last picture one frame before all.
Source: huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_qwenimage.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffquant.runtime.models.facts import (
    Hyper,
    Shapes,
    count,
    number,
    require,
    rotary_axes,
    shape_of,
)

__all__ = ["QwenImageConfig", "config_from"]

_DEFAULT_AXES = (16, 56, 56)


@dataclass(frozen=True, slots=True)
class QwenImageConfig:
    """Sizes of a Qwen-Image transformer.

    Attributes:
        in_channels, out_channels: per token: latent channels times 4.
        hidden, text_hidden: inner widths of the picture's and the text's feed-forward.
        context: width of the text encoder's states.
        time: width of the timestep sinusoids.
        condition: whether a second, integer condition joins the timestep (Layered).
        still: whether other pictures are modulated at time 0 (Edit-2511).
        layered: whether the last picture stands one frame before all (Layered).
        axes: rotary widths of the three position axes; their sum is head_dim.
    """

    in_channels: int
    out_channels: int
    width: int
    hidden: int
    text_hidden: int
    head_dim: int
    context: int
    time: int
    depth: int
    condition: bool
    still: bool
    layered: bool
    axes: tuple[int, ...]
    theta: float
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> QwenImageConfig:
    """Read sizes from keys; hyper: axes_dims_rope, theta, eps, zero_cond_t, use_layer3d_rope.

    Raises:
        ArchitectureError: rotary axes that do not fill a head, or a field the runtime does not
            implement.
    """
    require(hyper, "guidance_embeds", (False,))
    require(hyper, "patch_size", (2,))
    block = "transformer_blocks.0"
    width, in_channels = shape_of(shapes, "img_in.weight")
    (head_dim,) = shape_of(shapes, f"{block}.attn.norm_q.weight")
    axes = rotary_axes(hyper, "axes_dims_rope", _DEFAULT_AXES, head_dim)
    return QwenImageConfig(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "proj_out.weight")[0],
        width=width,
        hidden=shape_of(shapes, f"{block}.img_mlp.net.0.proj.weight")[0],
        text_hidden=shape_of(shapes, f"{block}.txt_mlp.net.0.proj.weight")[0],
        head_dim=head_dim,
        context=shape_of(shapes, "txt_in.weight")[1],
        time=shape_of(shapes, "time_text_embed.timestep_embedder.linear_1.weight")[1],
        depth=count(shapes, "transformer_blocks"),
        condition="time_text_embed.addition_t_embedding.weight" in shapes,
        still=bool(hyper.get("zero_cond_t")),
        layered=bool(hyper.get("use_layer3d_rope")),
        axes=axes,
        theta=number(hyper, "theta", 10000.0),
        eps=number(hyper, "eps", 1e-6),
    )
