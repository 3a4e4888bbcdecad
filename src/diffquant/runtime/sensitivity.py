"""measure_sensitivity(): run the model, and price every tensor in every format in pixels.

Each picture is differentiated once, all its steps and the autoencoder included
(runtime/differentiate.py); then every layer's weight is encoded in every format, and

    error(t, f) = coherence * sum_nk r_n (W - Q_f(W))_nk^2 c_k / sum r

with r and c the power of the gradient by row and by column. To first order that is the mean squared
error of the pixels in [0, 1] which this tensor alone would cause; the coherence of errors that are
not independent is runtime/gradients.py's. Errors of tensors are taken to add up.
docs/sensitivity.md has what was compared with it.

Large tensors are judged by some of their rows (runtime/pricing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffquant.convert.sensitivity import Sensitivity
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.importance import ImportanceMatrix
from diffquant.runtime.calibration_run import CalibrationRun
from diffquant.runtime.differentiate import (
    LEVELS,
    Differentiated,
    Level,
    differentiate_pictures,
)
from diffquant.runtime.facts_of_run import hash_of_model
from diffquant.runtime.pricing import AMONG, check_among, format_errors

__all__ = ["LEVELS", "Level", "MeasuredSensitivity", "measure_sensitivity", "price_formats"]

_UNITS: Mapping[Level, str] = {
    "pictures": "mean squared error of pixels in [0, 1], to first order",
    "latents": "mean squared error of the last latents, to first order",
}


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
    found = differentiate_pictures(model, prompts, level=level, progress=progress, **run)
    context = {"steps": str(how.steps), "seed": str(how.seed)}
    return price_formats(
        model,
        found,
        names,
        matrix=matrix,
        everywhere=everywhere,
        context=context,
        progress=progress,
    )


def price_formats(
    model: Path,
    found: Differentiated,
    among: Sequence[str] = AMONG,
    *,
    matrix: ImportanceMatrix | None = None,
    everywhere: bool = False,
    context: Mapping[str, str],
    progress: Progress = NO_PROGRESS,
) -> MeasuredSensitivity:
    """Price formats with gradients that were measured; arguments as `measure_sensitivity`.

    `context` is kept in the file, beside what `found` knows of itself.
    """
    names = check_among(among, matrix=matrix is not None)
    errors = _priced(found, names, (matrix, everywhere), progress)
    width, height = found.size
    told = {
        "level": found.level,
        "pictures": str(found.gradients.pictures),
        **context,
        "size": f"{width}x{height}",
        "importance": "none" if matrix is None else "all formats" if everywhere else "if needed",
    }
    made = Sensitivity(
        found.architecture, "outputs", _UNITS[found.level], hash_of_model(model), errors, told
    )
    warnings = tuple(dict.fromkeys((*found.warnings, *_told(found))))
    return MeasuredSensitivity(made, found.unused, found.gradients.pictures, warnings)


def _told(found: Differentiated) -> Iterator[str]:
    if found.unused:
        yield (
            f"{len(found.unused)} of {len(found.power)} layers change no picture here, such as "
            f"{found.unused[0]}: any format of theirs is priced 0"
        )


def _priced(
    found: Differentiated,
    names: Sequence[str],
    weighing: tuple[ImportanceMatrix | None, bool],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    errors: dict[str, dict[str, float]] = {}
    matrix, everywhere = weighing
    progress.start("encode", len(found.power), "tensor")
    try:
        for key, layer in found.gradients.layers.items():
            weight = layer.weight(torch.float32).cpu().numpy()
            values = None
            if matrix is not None and key in matrix.entries:
                values = matrix.entries[key].values().astype(np.float32)
            known = found.power[key]
            priced = format_errors(weight, names, known, importance=values, everywhere=everywhere)
            errors[key] = {name: float(one / found.elements) for name, one in priced.items()}
            progress.advance(1, key)
    finally:
        progress.stop()
    return {key: one for key, one in errors.items() if one}
