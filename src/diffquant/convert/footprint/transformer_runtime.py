"""Rows of the denoisers that this package's runtime runs in another way than Diffusers.

What lives at their widest steps was read off runtime/models (flux, z_image, qwen_image, flux2),
live tensors counted one by one; tests/runtime/test_footprint_runtime.py counts them again. Rotating
queries or keys holds the pair in float32: both halves, their products, and the joined result. All
of them are guided one prediction after the other. On an NVIDIA card one kernel rotates and holds
less (runtime/kernels/tokens.py); the rows are of torch's own operations, which are an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffquant.convert.footprint.transformer_rows import TRANSFORMERS, Phase, Term, TransformerRow

__all__ = ["RUNTIME"]

_FLOAT32 = 4
_TURNED = Term("q or k and its products in float32", width=3, tensors=3, itemsize=_FLOAT32)


def _as(kind: str, *phases: Phase) -> TransformerRow:
    return replace(TRANSFORMERS[kind], phases=phases, joined=False)


RUNTIME: Mapping[str, TransformerRow] = {
    "flux": _as(
        "flux",
        Phase(
            "single block: input of linear2",
            (
                Term("output of linear1", width=3, hidden=1),
                Term("GELU", hidden=1),
                Term("input of linear2", width=1, hidden=1),
                Term("residual, attention and the streams before joining", width=3, tensors=3),
            ),
        ),
    ),
    "z_image": _as(
        "z_image",
        Phase(
            "layer: rotating k",
            (
                _TURNED,
                Term("q, k, v", width=3),
                Term("normed q and k, rotated q", width=3, tensors=3),
                Term("residual and norm", width=2, tensors=2),
                Term("text stream before joining", width=1, tokens="text"),
            ),
        ),
        Phase(
            "layer: gated MLP",
            (
                Term("SiLU, value, product", hidden=3, tensors=3),
                Term("residual and norms", width=3, tensors=3),
                Term("text stream before joining", width=1, tokens="text"),
            ),
        ),
    ),
    "qwen_image": _as(
        "qwen_image",
        Phase(
            "block: rotating k",
            (
                _TURNED,
                Term("q, k, v, rotated q", width=4, tensors=4),
                Term("residual, norm, q, k, v", width=5, tokens="image", tensors=5),
                Term("text residual, norm, q, k, v", width=5, tokens="text", tensors=5),
            ),
        ),
        *TRANSFORMERS["qwen_image"].phases,
    ),
    "flux2": _as(
        "flux2",
        Phase(
            "double block: image MLP",
            (
                Term("both halves, SiLU, product", hidden=4, tokens="image", tensors=4),
                Term("q, k, v", width=3, tokens="image"),
                Term("residuals and norm", width=3, tokens="image", tensors=3),
                Term("joined attention", width=1),
                Term("text q, k, v and streams", width=5, tokens="text", tensors=3),
            ),
        ),
        Phase(
            "single block: rotating k",
            (
                _TURNED,
                Term("output of the input projection", width=3, hidden=2),
                Term("normed q and k, rotated q", width=3, tensors=3),
                Term("residual, and the streams before joining", width=2, tensors=2),
            ),
        ),
        Phase(
            "single block: input of the output projection",
            (
                Term("output of the input projection", width=3, hidden=2),
                Term("gated product", hidden=1),
                Term("input of the output projection", width=1, hidden=1),
                Term("residual, attention and the streams before joining", width=3, tensors=3),
            ),
        ),
    ),
}
