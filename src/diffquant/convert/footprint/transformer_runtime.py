"""Rows of the denoisers that this package's runtime runs in another way than Diffusers.

What lives at their widest steps was read off runtime/models/{z_image,qwen_image,flux2}.py, live
tensors counted one by one; tests/runtime/test_footprint_runtime.py counts them again. Rotating
queries or keys holds the pair in float32: both halves, their products, and the joined result. All
three are guided one prediction after the other.
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
                Term("q, k, v, normed q and k", width=5, tokens="image", tensors=5),
                Term("residuals and norm", width=3, tokens="image", tensors=3),
                Term("joined q, k, v, attention", width=4, tensors=4),
                Term("text q, k, v and streams", width=7, tokens="text", tensors=7),
            ),
        ),
        *TRANSFORMERS["flux2"].phases,
    ),
}
