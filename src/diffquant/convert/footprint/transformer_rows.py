"""What lives at the widest steps of each family of diffusion transformers.

One row per kind of denoiser. A phase lists tensors as multiples of the model's widths; which they
are was read off runs of the models themselves, their live tensors counted one by one (flux: of
runtime/models/flux.py; the others: of huggingface/diffusers 0.42.1, src/diffusers/models/
transformers/). tests/runtime/test_footprint.py counts them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["TRANSFORMERS", "Phase", "Term", "TransformerRow"]

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Term:
    """Tensors of every sample: tokens of a stream, so many columns.

    Attributes:
        width: columns of all of them, in multiples of the model's width.
        hidden: the same in multiples of the width inside its MLP.
        tokens: which stream.
        tensors: how many equal tensors that is.
        itemsize: bytes of a number; 0 means those of the compute dtype.
    """

    label: str
    width: float = 0
    hidden: float = 0
    tokens: Literal["all", "image", "text"] = "all"
    tensors: int = 1
    itemsize: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of a block and what lives during it.

    Attributes:
        needs: a key without which there is no such step.
    """

    where: str
    terms: tuple[Term, ...]
    needs: str = ""


@dataclass(frozen=True, slots=True)
class TransformerRow:
    """One kind of denoiser.

    Attributes:
        sizes: name -> (canonical key, axis): where a width stands in the shapes; empty where it is
            read off the heaviest list of blocks.
        phases: the steps that compete for the peak.
        text_tokens: tokens of text the model is usually given, the most where that varies.
        variant_tokens: the same for single variants.
        joined: whether guidance runs both predictions as one batch, rather than one by one.
        measured: whether the phases were checked against a run; False for a rule of thumb.
    """

    sizes: Mapping[str, tuple[str, int]]
    phases: tuple[Phase, ...]
    text_tokens: int
    joined: bool
    variant_tokens: Mapping[str, int] = field(default_factory=dict)
    measured: bool = True


def _sizes(width: str, hidden: str) -> dict[str, tuple[str, int]]:
    """Width: rows of the input's matrix; hidden: columns of the matrix down from the hidden."""
    return {"width": (width, 0), "hidden": (hidden, 1)}


def _rotary(where: str, *terms: Term, tokens: Literal["all", "image"] = "all") -> Phase:
    """Rotating q or k: Diffusers holds it in float32 three times."""
    turned = Term(
        "q or k and its products in float32", width=3, tokens=tokens, tensors=3, itemsize=_FLOAT32
    )
    return Phase(where, (turned, *terms))


TRANSFORMERS: Mapping[str, TransformerRow] = {
    "flux": TransformerRow(
        _sizes("img_in.weight", "double_blocks.0.img_mlp.2.weight"),
        (
            Phase(
                "single block: input of linear2",
                (
                    Term("output of linear1", width=3, hidden=1),
                    Term("GELU", hidden=1),
                    Term("input of linear2", width=1, hidden=1),
                    Term("rotated q, k and attention", width=3, tensors=3),
                    Term("residual", width=1),
                    Term("both streams before joining", width=1),
                ),
            ),
        ),
        text_tokens=512,
        joined=False,
        variant_tokens={"schnell": 256},
    ),
    "chroma": TransformerRow(
        _sizes("img_in.weight", "double_blocks.0.img_mlp.2.weight"),
        (
            _rotary(
                "single block: rotating k",
                Term("GELU", hidden=1),
                Term("residual, norm, q, k, v, pairs", width=6, tensors=6),
                Term("text stream", width=1, tokens="text"),
            ),
        ),
        text_tokens=512,
        joined=False,
    ),
    "flux2": TransformerRow(
        _sizes("img_in.weight", "double_blocks.0.img_mlp.2.weight"),
        (
            Phase(
                "single block: input of the output projection",
                (
                    Term("output of the input projection", width=3, hidden=2),
                    Term("gated product", hidden=1),
                    Term("input of the output projection", width=1, hidden=1),
                    Term("residual and norm", width=2, tensors=2),
                    Term("rotated q, k and attention", width=3, tensors=3),
                    Term("text stream", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=512,
        joined=False,
    ),
    "sd3": TransformerRow(
        _sizes("context_embedder.weight", "joint_blocks.0.x_block.mlp.fc2.weight"),
        (
            Phase(
                "joint block: image MLP",
                (
                    Term("hidden and its GELU", hidden=2, tokens="image", tensors=2),
                    Term("residuals and norm", width=4, tokens="image", tensors=4),
                    Term("attention", width=1),
                    Term("text residuals", width=2, tokens="text", tensors=2),
                ),
            ),
            Phase(
                "joint block with two attentions: image MLP",
                (
                    Term("hidden and its GELU", hidden=2, tokens="image", tensors=2),
                    Term("residuals and norms", width=5, tokens="image", tensors=5),
                    Term("attention", width=1),
                    Term("text residuals", width=2, tokens="text", tensors=2),
                ),
                needs="joint_blocks.0.x_block.attn2.qkv.weight",
            ),
        ),
        text_tokens=333,  # 77 of CLIP and 256 of T5
        joined=True,
    ),
    "qwen_image": TransformerRow(
        _sizes("img_in.weight", "transformer_blocks.0.img_mlp.net.2.weight"),
        (
            Phase(
                "block: image MLP",
                (
                    Term("hidden and its GELU", hidden=2, tokens="image", tensors=2),
                    Term("residuals, norms, attention", width=7, tokens="image", tensors=7),
                    Term("text residuals and attention", width=6, tokens="text", tensors=6),
                ),
            ),
        ),
        text_tokens=512,
        joined=False,
    ),
    "z_image": TransformerRow(
        _sizes("x_embedder.weight", "layers.0.feed_forward.w2.weight"),
        (
            Phase(
                "layer: gated MLP",
                (
                    Term("gate, SiLU, value, product", hidden=4, tensors=4),
                    Term("residual and norms", width=4, tensors=4),
                    Term("image stream before joining", width=1, tokens="image"),
                    Term("text stream before joining", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=512,
        joined=True,
    ),
    "lumina2": TransformerRow(
        _sizes("x_embedder.weight", "layers.0.feed_forward.w2.weight"),
        (
            Phase(
                "layer: gated MLP",
                (
                    Term("gate and its SiLU in float32", hidden=2, tensors=2, itemsize=_FLOAT32),
                    Term("gate", hidden=1),
                    Term("residuals and norms", width=6, tensors=6),
                    Term("text stream before joining", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=256,
        joined=False,
    ),
    "pixart": TransformerRow(
        _sizes("blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.weight"),
        (
            Phase(
                "block: MLP",
                (
                    Term("hidden and its GELU", hidden=2, tokens="image", tensors=2),
                    Term("residuals and norm", width=4, tokens="image", tensors=4),
                    Term("text", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=300,
        joined=True,
    ),
    "auraflow": TransformerRow(
        _sizes("init_x_linear.weight", "single_layers.0.mlp.c_proj.weight"),
        (
            Phase(
                "single layer: gated MLP",
                (
                    Term("SiLU, value, product", hidden=3, tensors=3),
                    Term("residuals and norms", width=4, tensors=4),
                    Term("image stream before joining", width=1, tokens="image"),
                    Term("text stream before joining", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=264,  # 256 and 8 register tokens
        joined=True,
    ),
    "wan": TransformerRow(
        _sizes("text_embedding.2.weight", "blocks.0.ffn.2.weight"),
        (
            _rotary(
                "block: rotating k",
                Term("residual, norm, q, k, v", width=5, tokens="image", tensors=5),
                Term("text and its k, v", width=3, tokens="text", tensors=3),
                tokens="image",
            ),
            Phase(
                "block: MLP",
                (
                    Term("hidden and its GELU", hidden=2, tokens="image", tensors=2),
                    Term("residual and norms", width=4, tokens="image", tensors=4),
                    Term("text", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=512,
        joined=False,
    ),
    "ltx": TransformerRow(
        _sizes("patchify_proj.weight", "transformer_blocks.0.ff.net.2.weight"),
        (
            _rotary(
                "block: rotating k",
                Term(
                    "cosines and sines in float32",
                    width=2,
                    tokens="image",
                    tensors=2,
                    itemsize=_FLOAT32,
                ),
                Term("residual, norm, q, k, v, pairs", width=6, tokens="image", tensors=6),
                Term("text", width=1, tokens="text"),
                tokens="image",
            ),
        ),
        text_tokens=256,
        joined=True,
    ),
    "hunyuan_video": TransformerRow(
        _sizes("img_in.proj.weight", "double_blocks.0.img_mlp.fc2.weight"),
        (
            _rotary(
                "single block: rotating k",
                Term("GELU", hidden=1),
                Term("joined streams, norm, q, k, v", width=6, tensors=6),
                Term("image stream, pairs", width=2, tokens="image", tensors=2),
                tokens="image",
            ),
        ),
        text_tokens=256,
        joined=False,
    ),
    "krea2": TransformerRow(
        {},  # two namings, and no known way between them
        (
            Phase(
                "block: gated MLP",
                (
                    Term("gate, value, product", hidden=3, tensors=3),
                    Term("residuals and norm", width=4, tensors=4),
                    Term("text stream before joining", width=1, tokens="text"),
                ),
            ),
        ),
        text_tokens=512,
        joined=False,
    ),
}
