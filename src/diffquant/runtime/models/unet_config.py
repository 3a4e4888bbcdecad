"""What a UNet of the Stable Diffusion family holds, read from its keys.

Depths, widths and which blocks there are come from names and shapes; a config is asked only for
what they cannot say: heads, groups, an epsilon. Names are CompVis', as in unet.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from diffquant.core.errors import ArchitectureError, MissingKeys
from diffquant.runtime.models.facts import (
    Hyper,
    Shapes,
    count,
    number,
    per_level,
    require,
    shape_of,
)

__all__ = [
    "AttentionSpec", "BlockSpec", "LayerSpec", "ResSpec", "ResampleSpec", "UNetConfig",
    "config_from",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResSpec:
    """A residual block: channels before and after it."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """A spatial transformer of `depth` blocks.

    Attributes:
        hidden: width inside the gated feed-forward.
        convolution: whether proj_in and proj_out are 1x1 convolutions (SD1.5) or matrices.
    """

    channels: int
    context: int
    hidden: int
    heads: int
    depth: int
    convolution: bool


@dataclass(frozen=True, slots=True)
class ResampleSpec:
    """A change of resolution by two; `up` doubles."""

    channels: int
    up: bool


LayerSpec: TypeAlias = ResSpec | AttentionSpec | ResampleSpec
BlockSpec: TypeAlias = tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Sizes of a UNet.

    Attributes:
        base: width of the timestep sinusoids and of the first convolution.
        embedding: width of the timestep embedding.
        label: width of the extra vector (SDXL: pooled text and sizes), None without `label_emb`.
        guidance: width of the guidance embedding (latent consistency models), None without one.
        inputs, middle, outputs: what each block holds; inputs[0] is the first convolution and is
            empty.
        eps: of the group norms in residual blocks; those of transformers use 1e-6.
    """

    in_channels: int
    out_channels: int
    base: int
    embedding: int
    label: int | None
    guidance: int | None
    inputs: tuple[BlockSpec, ...]
    middle: BlockSpec
    outputs: tuple[BlockSpec, ...]
    groups: int
    eps: float


def _heads(hyper: Hyper, shapes: Shapes, name: str, level: int, channels: int) -> int:
    """Attention heads at a level.

    `attention_head_dim` of published configs is a head count (8; [5, 10, 20]): diffusers named it
    wrongly and kept it. Without a config: 8 heads where proj_in is a convolution (SD1.5), else
    heads of 64.
    """
    given = hyper.get("num_attention_heads") or hyper.get("attention_head_dim")
    if given is not None:
        return per_level(given, level)
    return 8 if len(shape_of(shapes, f"{name}.proj_in.weight")) == 4 else channels // 64


def _layers(shapes: Shapes, prefix: str, hyper: Hyper, level: int) -> Iterator[LayerSpec]:
    for index in range(count(shapes, prefix)):
        name = f"{prefix}.{index}"
        if f"{name}.in_layers.2.weight" in shapes:
            after, before, *_ = shape_of(shapes, f"{name}.in_layers.2.weight")
            yield ResSpec(before, after)
        elif f"{name}.proj_in.weight" in shapes:
            channels, *rest = shape_of(shapes, f"{name}.proj_in.weight")
            block = f"{name}.transformer_blocks.0"
            yield AttentionSpec(
                channels=channels,
                context=shape_of(shapes, f"{block}.attn2.to_k.weight")[1],
                hidden=shape_of(shapes, f"{block}.ff.net.2.weight")[1],
                heads=_heads(hyper, shapes, name, level, channels),
                depth=count(shapes, f"{name}.transformer_blocks"),
                convolution=len(rest) == 3,
            )
        elif f"{name}.op.weight" in shapes:
            yield ResampleSpec(shape_of(shapes, f"{name}.op.weight")[0], up=False)
        elif f"{name}.conv.weight" in shapes:
            yield ResampleSpec(shape_of(shapes, f"{name}.conv.weight")[0], up=True)
        else:
            raise MissingKeys(f"{name} is no block this model knows", keys=(name,))


def config_from(shapes: Shapes, hyper: Hyper) -> UNetConfig:
    """Read blocks from keys.

    Hyper: attention_head_dim or num_attention_heads, norm_num_groups, norm_eps.
    """
    require(hyper, "act_fn", ("silu", "swish"))
    require(hyper, "flip_sin_to_cos", (True,))
    require(hyper, "freq_shift", (0,))
    first = shape_of(shapes, "input_blocks.0.0.weight")
    level = 0
    inputs: list[BlockSpec] = [()]
    for index in range(1, count(shapes, "input_blocks")):
        block = tuple(_layers(shapes, f"input_blocks.{index}", hyper, level))
        level += sum(isinstance(layer, ResampleSpec) for layer in block)
        inputs.append(block)
    middle = tuple(_layers(shapes, "middle_block", hyper, level))
    outputs: list[BlockSpec] = []
    for index in range(count(shapes, "output_blocks")):
        block = tuple(_layers(shapes, f"output_blocks.{index}", hyper, level))
        level -= sum(isinstance(layer, ResampleSpec) for layer in block)
        outputs.append(block)
    if level != 0 or len(inputs) != len(outputs):
        raise ArchitectureError(
            f"{len(inputs)} input and {len(outputs)} output blocks do not match"
        )
    embedding, base = shape_of(shapes, "time_embed.0.weight")
    label = shapes.get("label_emb.0.0.weight")
    guidance = shapes.get("time_embed.cond_proj.weight")
    require(hyper, "time_cond_proj_dim", () if guidance is None else (guidance[1],))
    return UNetConfig(
        in_channels=first[1],
        out_channels=shape_of(shapes, "out.2.weight")[0],
        base=base,
        embedding=embedding,
        label=None if label is None else label[1],
        guidance=None if guidance is None else guidance[1],
        inputs=tuple(inputs),
        middle=middle,
        outputs=tuple(outputs),
        groups=int(number(hyper, "norm_num_groups", 32)),
        eps=number(hyper, "norm_eps", 1e-5),
    )
