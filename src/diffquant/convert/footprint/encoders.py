"""Activations of text encoders. Small beside their weights: counted roughly, and upwards.

A layer holds its residual, norm, q, k, v and output, and twice two hidden maps of a gated
feed-forward. T5 adds the bias of positions, heads x tokens x tokens, twice
(huggingface/transformers 5.23.0: src/transformers/models/t5/modeling_t5.py). Language models are
asked for the states of every layer, and compute logits where Diffusers calls the whole model
(huggingface/diffusers@58eb52c: src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py). The
runtime of this package computes no logits, and its layers hold three hidden maps and two others.
"""

from __future__ import annotations

from diffquant.convert.architectures.names import count
from diffquant.convert.footprint.companions import EncoderSizes
from diffquant.convert.footprint.moments import Buffer, Moment
from diffquant.convert.rules import Shapes

__all__ = ["encoder_moment", "sizes_of"]

_CLIP = ("clip_text", "openclip_text")
_CLIP_TOKENS = 77
_T5_HEAD = 64  # width of a head of every T5
_WIDTHS, _HIDDEN = 8, 4


def sizes_of(shapes: Shapes, kind: str) -> EncoderSizes | None:
    """Sizes from the shapes of a part of that kind; None where they do not tell."""
    tables = [
        (shape[0], shape[1])
        for key, shape in shapes.items()
        if len(shape) == 2 and ("embed" in key or key.endswith("shared.weight"))
    ]
    if not tables:
        return None
    vocabulary, width = max(tables)
    inside = [shape[0] for shape in shapes.values() if len(shape) == 2 and shape[1] == width]
    hidden = max((rows for rows in inside if rows != vocabulary), default=width)
    return EncoderSizes(kind, width, hidden, _depth(shapes), vocabulary)


def encoder_moment(
    sizes: EncoderSizes, *, text_tokens: int, batch: int, itemsize: int, ours: bool = False
) -> Moment:
    """The widest step of encoding `batch` prompts of `text_tokens` tokens.

    Args:
        sizes: of the encoder.
        text_tokens: per prompt; CLIP's own number is known.
        batch: prompts.
        itemsize: bytes of a number of the compute dtype.
        ours: whether the runtime of this package runs it.
    """
    if ours:
        return _runtime_moment(sizes, text_tokens=text_tokens, batch=batch, itemsize=itemsize)
    tokens = (_CLIP_TOKENS if sizes.kind in _CLIP else text_tokens) * batch
    width, each = sizes.width, tokens * itemsize
    buffers = [
        Buffer("residual, norm, q, k, v", _WIDTHS * width * each, _WIDTHS),
        Buffer("feed-forward", _HIDDEN * sizes.hidden * each, _HIDDEN),
    ]
    if sizes.kind == "t5_encoder":
        heads = max(width // _T5_HEAD, 1)
        buffers.append(Buffer("position bias", 2 * heads * text_tokens * tokens * itemsize, 2))
    elif sizes.kind not in _CLIP:
        buffers.append(
            Buffer("states of every layer", (sizes.layers + 1) * width * each, sizes.layers + 1)
        )
        buffers.append(Buffer("logits", sizes.vocabulary * each))
    return Moment("encoding", tuple(buffers))


def _runtime_moment(sizes: EncoderSizes, *, text_tokens: int, batch: int, itemsize: int) -> Moment:
    """A feed-forward of runtime/models/{clip,t5,qwen_text}.py: the gate, its product, the other."""
    tokens = (_CLIP_TOKENS if sizes.kind in _CLIP else text_tokens) * batch
    width, each = sizes.width, tokens * itemsize
    hidden = Buffer("feed-forward", 3 * sizes.hidden * each, 3)
    if sizes.kind == "t5_encoder":
        heads = max(width // _T5_HEAD, 1)
        bias = Buffer("position bias", heads * text_tokens * text_tokens * itemsize)
        return Moment("encoding", (Buffer("residuals and norm", 3 * width * each, 3), hidden, bias))
    states = sizes.layers + 2  # the embedding, every layer, a norm
    return Moment(
        "encoding", (Buffer("states of every layer", states * width * each, states), hidden)
    )


def _depth(shapes: Shapes) -> int:
    heads = {key[: key.index(".0.")] for key in shapes if ".0." in key}
    return max((count(shapes, head) for head in heads), default=1)
