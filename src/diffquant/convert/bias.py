"""Bias correction: what rounding takes from the mean of a layer's output goes into its bias.

    y = x W^T + b      new b = b + (W - decoded) @ mean(x)

so that, over the inputs that were measured (`diffquant calibrate --inputs`), the rounded layer's
output is wrong by noise alone and not by a constant. It costs no byte: the bias is there already
and keeps its dtype. A layer without a bias is left as it is, since loaders refuse tensors they do
not know, and the plan counts such layers.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, arXiv
1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.importance import check_columns
from diffquant.convert.step import Step
from diffquant.core.errors import UsageError, shorten
from diffquant.io.inputs import InputsFile
from diffquant.quant.formats import FORMATS, matrix_shape

__all__ = ["BIAS_CORRECTION", "BiasFix", "Corrected", "correct_biases", "whole_pairs"]

BIAS_CORRECTION = "diffquant.bias_correction"  # header key: what the means come from


@dataclass(frozen=True, slots=True)
class BiasFix:
    """One layer: indices of its steps, and the mean of its input, (K,)."""

    weight: int
    bias: int
    mean: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Corrected:
    """Steps whose biases will be corrected.

    Attributes:
        steps: as given; biases to correct are encoded, in the dtype they have, and say why.
        fixes: the layers.
        notes: how many, and which layers are not.
    """

    steps: tuple[Step, ...]
    fixes: tuple[BiasFix, ...] = ()
    notes: tuple[str, ...] = ()


def correct_biases(steps: Sequence[Step], inputs: InputsFile) -> Corrected:
    """Pair the denoiser's packed weights with their biases and with the means of their inputs.

    Raises:
        UsageError: no layer can be corrected.
        UnsupportedShape: statistics of another model.
        MalformedFile: a mean that is not finite.
    """
    index = {step.target: at for at, step in enumerate(steps)}
    found = list(steps)
    fixes: list[BiasFix] = []
    without: dict[str, list[str]] = {}
    for at, step in enumerate(steps):
        name = step.decision.format
        if step.part != "denoiser" or not name or FORMATS[name].is_cast:
            continue
        bias = index.get(f"{step.target.removesuffix('.weight')}.bias", -1)
        why = _unfit(step, steps[bias] if bias >= 0 else None, inputs)
        if why:
            without.setdefault(why, []).append(step.key)
            continue
        check_columns(inputs, step.key, matrix_shape(step.assignment.shape)[1])
        fixes.append(BiasFix(at, bias, inputs.mean(step.key)))
        found[bias] = _told(steps[bias])
    listed = "; ".join(f"{len(keys)} {why}: {shorten(keys, 3)}" for why, keys in without.items())
    if not fixes:
        raise UsageError(
            f"--bias-correction: no bias can be corrected ({listed or 'nothing is packed'})"
        )
    note = f"biases of {len(fixes)} layers corrected by the mean inputs of {inputs.path.name}"
    return Corrected(tuple(found), tuple(fixes), (f"{note}; not: {listed}" if listed else note,))


def _unfit(step: Step, bias: Step | None, inputs: InputsFile) -> str:
    """Why a packed weight's bias is left alone; "" where it is corrected."""
    if bias is None:
        return "have no bias"
    plain = bias.decision.format or bias.stored
    if plain not in FORMATS or not FORMATS[plain].is_cast:
        return "have a bias that is packed itself"
    if bias.assignment.shape != step.assignment.shape[:1]:
        return "have a bias of another shape"
    if step.key not in inputs.columns:
        return "were not measured"
    return ""


def _told(bias: Step) -> Step:
    """A bias that is encoded rather than copied, and says why."""
    plain = bias.decision.format or bias.stored
    reason = f"{bias.decision.reason}; corrected by mean inputs"
    return replace(bias, decision=replace(bias.decision, format=plain, reason=reason))


def whole_pairs(fixes: Sequence[BiasFix], finished: Mapping[int, object]) -> set[int]:
    """Of finished steps, those that stand for themselves: a weight without its bias does not."""
    broken: set[int] = set()
    for fix in fixes:
        if (fix.weight in finished) != (fix.bias in finished):
            broken |= {fix.weight, fix.bias}
    return set(finished) - broken
