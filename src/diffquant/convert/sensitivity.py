"""How much each tensor's rounding costs the pictures, by format: what bits are allocated by.

A file of a few hundred kilobytes, made once (`diffquant calibrate --sensitivity FILE`) and good for
any budget, so that asking for 6 GB and then for 5 GB measures nothing twice::

    {"diffquant_sensitivity": 1, "architecture": "flux1", "method": "outputs", "source": "<sha256>",
     "unit": "...", "errors": {"double_blocks.0.img_attn.qkv.weight": {"q4_k": 1.2e-5, ...}, ...}}

`errors` are additive: their sum over all tensors, each in its chosen format, predicts the error of
the whole model in `unit`. Keys are canonical and local to the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SENSITIVITY_VERSION", "Sensitivity"]

SENSITIVITY_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Predicted error per tensor and format.

    Attributes:
        architecture: slug.
        method: "outputs" (measured on running the model) or "weights" (from weights, and importance
            where there is some).
        unit: what the sum of errors predicts, in words.
        source: fingerprint of the checkpoint it was measured on, "" where unknown.
        errors: canonical part-local key -> format -> predicted error, finite and not negative.
        context: how it was measured: prompts, steps, seed and the like, for reports.
    """

    architecture: str
    method: str
    unit: str
    source: str
    errors: Mapping[str, Mapping[str, float]]
    context: Mapping[str, str]
