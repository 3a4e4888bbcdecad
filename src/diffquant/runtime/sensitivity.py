"""measure_sensitivity(): run the model, and price every tensor in every format in pixels.

Each picture is differentiated once, all its steps and the autoencoder included
(runtime/gradients.py); then every layer's weight is encoded in every format, and

    error(t, f) = sum_nk r_n (W - Q_f(W))_nk^2 c_k / sum r

with r and c the power of the gradient by row and by column. To first order, and for rounding errors
that are independent, that is the mean squared error of the pixels in [0, 1] which this tensor alone
would cause; errors of tensors add up. docs/sensitivity.md has what was compared with it.

Large tensors are judged by some of their rows (runtime/pricing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from diffquant.convert.sensitivity import Sensitivity
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.importance import ImportanceMatrix
from diffquant.runtime.calibrate import layers_of
from diffquant.runtime.calibration_run import CalibrationRun
from diffquant.runtime.devices import full_float32
from diffquant.runtime.facts_of_run import hash_of_model
from diffquant.runtime.gradients import GradientPower, recomputed
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.pricing import AMONG, check_among, format_errors
from diffquant.runtime.request import PictureRequest

__all__ = ["LEVELS", "Level", "MeasuredSensitivity", "measure_sensitivity"]

Level: TypeAlias = Literal["pictures", "latents"]

_UNITS: Mapping[Level, str] = {
    "pictures": "mean squared error of pixels in [0, 1], to first order",
    "latents": "mean squared error of the last latents, to first order",
}
LEVELS: tuple[Level, ...] = ("pictures", "latents")
# Power of a gradient, next to the strongest layer's, that float32 leaves where the true one is 0.
_ROUNDING = float(np.finfo(np.float32).eps) ** 2


@dataclass(frozen=True, slots=True)
class MeasuredSensitivity:
    """What was measured.

    Attributes:
        sensitivity: errors by canonical key and format.
        unused: keys of layers that no picture depends on: their errors are 0.
        pictures: how many were differentiated.
        warnings: as the runtime has them.
    """

    sensitivity: Sensitivity
    unused: tuple[str, ...]
    pictures: int
    warnings: tuple[str, ...]


def measure_sensitivity(
    model: Path,
    prompts: Sequence[str],
    *,
    among: Sequence[str] = AMONG,
    level: Level = "pictures",
    matrix: ImportanceMatrix | None = None,
    everywhere: bool = False,
    progress: Progress = NO_PROGRESS,
    **run: Any,  # noqa: ANN401 (what CalibrationRun takes)
) -> MeasuredSensitivity:
    """Differentiate one picture per prompt, and price the denoiser's layers.

    Args:
        model: what `generate` takes; use the unquantized source.
        prompts: one per picture.
        among: FORMATS names to price.
        level: what is differentiated, the decoded picture or the last latents (less memory).
        matrix: importance matrix, by canonical key, for formats that need one.
        everywhere: whether formats that can do without are priced as encoded with it too. Their
            errors then are not independent, and the sum can promise too much.
        progress: told about steps, then about tensors.
        run: fields of CalibrationRun: how the pictures are made.

    Raises:
        DiffquantError: a part, a size or a value that does not fit; or gradients not finite.
    """
    if not prompts:
        raise UsageError("no prompts to measure with")
    names = check_among(among, matrix=matrix is not None)
    how = CalibrationRun(**run)
    opened = how.open(model)
    denoiser = opened.pipeline.parts.denoiser
    requests = how.requests(prompts, opened)
    power = GradientPower(dict(layers_of(denoiser)), how.seed)
    warnings = list(opened.warnings)
    elements = 0
    progress.start("differentiate", how.steps * len(prompts), "step")
    try:
        with power.hooked(), recomputed(denoiser):
            for request in requests:
                elements, cut = _differentiate(opened.pipeline, request, level, progress)
                power.finish_picture()
                warnings += [f"the prompt was cut: {text!r}" for text in cut]
    finally:
        progress.stop()
    errors, unused = _priced(power, names, elements, (matrix, everywhere), progress)
    context = {
        "level": level,
        "pictures": str(len(prompts)),
        "steps": str(how.steps),
        "seed": str(how.seed),
        "size": f"{requests[0].width}x{requests[0].height}",
        "importance": "none" if matrix is None else "all formats" if everywhere else "if needed",
    }
    made = Sensitivity(
        opened.architecture, "outputs", _UNITS[level], hash_of_model(model), errors, context
    )
    return MeasuredSensitivity(
        made, unused, len(prompts), tuple(dict.fromkeys((*warnings, *_told(unused, power))))
    )


def _told(unused: Sequence[str], power: GradientPower) -> Iterator[str]:
    if unused:
        yield (
            f"{len(unused)} of {len(power.layers)} layers change no picture here, such as "
            f"{unused[0]}: any format of theirs is priced 0"
        )


@full_float32()
def _differentiate(
    pipeline: Pipeline, request: PictureRequest, level: Level, progress: Progress
) -> tuple[int, tuple[str, ...]]:
    """Send one random direction back through a picture: its number of values, and cut prompts."""
    with torch.enable_grad():
        found = pipeline.walk(request, on_step=lambda _done, _total: progress.advance(1))
        made = found.latents
        if level == "pictures":
            autoencoder = pipeline.parts.vae
            weights = next(autoencoder.parameters())
            z = autoencoder.unscale(made.to(weights.device, torch.float32)).to(weights.dtype)
            made = autoencoder.decode(z).float() / 2  # [-1, 1] to a range of 1
        seeded = torch.Generator().manual_seed(request.seeds[0])
        direction = torch.randn(made.shape, generator=seeded).to(made.device)
        if made.requires_grad:
            (made * direction).sum().backward()  # type: ignore[no-untyped-call]
    return made.numel(), found.truncated


def _priced(
    power: GradientPower,
    names: Sequence[str],
    elements: int,
    weighing: tuple[ImportanceMatrix | None, bool],
    progress: Progress,
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    errors: dict[str, dict[str, float]] = {}
    totals: dict[str, float] = {}
    matrix, everywhere = weighing
    progress.start("encode", len(power.layers), "tensor")
    try:
        for key, layer in power.layers.items():
            known = power.power(key)
            weight = layer.weight(torch.float32).cpu().numpy()
            values = None
            if matrix is not None and key in matrix.entries:
                values = matrix.entries[key].values().astype(np.float32)
            found = format_errors(weight, names, known, importance=values, everywhere=everywhere)
            errors[key] = {name: float(error / elements) for name, error in found.items()}
            totals[key] = float(known.total)
            progress.advance(1, key)
    finally:
        progress.stop()
    least = max(totals.values(), default=0.0) * _ROUNDING
    unused = tuple(key for key, total in totals.items() if total <= least)
    for key in unused:
        errors[key] = dict.fromkeys(errors[key], 0.0)
    return {key: found for key, found in errors.items() if found}, unused
