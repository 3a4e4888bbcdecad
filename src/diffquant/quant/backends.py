"""BACKENDS: which function serves (codec, operation, device); reading it imports nothing heavy.

Operations, on numpy arrays; `weight` is float32 (R, K), a chunk of whole rows of a weight seen as a
matrix; parts are keyed as the FORMATS row names them:

- `encode(weight, stats=None, *, fmt) -> dict[str, ndarray]`: parts of these rows. Block types
  return uint8 (R, bytes), fp8 its bit patterns as uint8 (R, K), bf16 its bits as uint16. Where the
  FORMATS row's `importance` is not "unused", also `importance`, (K,) float32 or None.
- `decode(parts, shape, *, fmt) -> float32 (R, K)`, the inverse, exact in float32; `shape` is (R,
  K).
- `reduce(weight, stats=None, *, fmt) -> stats`: two-pass formats only; folds a chunk into a float,
  or into (sum, count) where the row's `statistic` is a mean.

`fmt` is the FORMATS name: one codec may serve several (`cast`).

On device "cuda", `encode(weight, stats=None, *, fmt)` takes and returns torch tensors on a card:
the same parts with the same bytes; codecs in WEIGHTED_ON_CARDS take `importance` too. Only codecs
for which the way to a card pays have it.

A function is named "module:attribute" and loaded when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from diffquant.core.errors import UnknownFormat
from diffquant.quant.formats import FORMATS

__all__ = ["BACKENDS", "WEIGHTED_ON_CARDS", "Statistic", "backend"]

Statistic = float | tuple[float, int]  # what `reduce` returns: a largest magnitude, or a mean's

_ROOM = "diffquant.quant.codecs"
_ON_CARDS = {
    "q8_0": "blocks_32",
    "q4_0": "blocks_32",
    "q4_1": "blocks_32",
    "q5_0": "blocks_32",
    "q5_1": "blocks_32",
    "q4_k": "k_affine",
    "q5_k": "k_affine",
    "q6_k": "q6_k",
    "q2_k": "q2_k",
    "q3_k": "q3_k",
    "int8_convrot": "int8_convrot",
    "iq4_nl": "iq4",
    "iq4_xs": "iq4",
    "nf4": "flat_blocks",
    "convrot_w4a4": "convrot_w4a4",
    "asym_w4a8_int8": "asym_w4a8_int8",
    "mxfp4": "blocks_32",
    "mxfp8": "tiled",
    "nvfp4_comfy": "tiled",
    "fp4_bnb": "flat_blocks",
    "double_quant": "flat_blocks",
    "iq2_xxs": "iq_blocks",
    "iq2_xs": "iq_blocks",
    "iq2_s": "iq_blocks",
    "iq3_xxs": "iq_blocks",
    "iq3_s": "iq_blocks",
}  # codec -> module of its encoder

# Codecs whose encoder for cards weighs errors by importance, (K,) float32, too.
WEIGHTED_ON_CARDS = frozenset(
    {"q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"}
    | {"iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
)

# device "reference" is the plain specification, "cpu" what the engine runs.
BACKENDS: dict[tuple[str, str, str], str] = {
    (codec, operation, device): f"{_ROOM}{'.numba' if device == 'cpu' else ''}.{codec}:{operation}"
    for row in FORMATS.values()
    for codec in (row.codec,)
    for operation in (
        *(("encode",) if row.encodes else ()),
        "decode",
        *(("reduce",) if row.passes == 2 else ()),
    )
    for device in ("reference", "cpu")
} | {
    (codec, "encode", "cuda"): f"{_ROOM}.triton.{module}:{codec}"
    for codec, module in _ON_CARDS.items()
}


def backend(codec: str, operation: str, device: str = "cpu") -> Callable[..., Any]:
    """Load the function for (codec, operation, device).

    Raises:
        UnknownFormat: no such row.
    """
    try:
        module, _, attribute = BACKENDS[codec, operation, device].partition(":")
    except KeyError:
        raise UnknownFormat(
            f"{codec}/{operation}/{device}", sorted({c for c, _, _ in BACKENDS})
        ) from None
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded
