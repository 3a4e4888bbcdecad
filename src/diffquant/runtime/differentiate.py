"""differentiate_pictures(): one picture per prompt is made with gradients on, and sent back.

All its steps, guidance and the autoencoder are differentiated (gradients.py); what is kept is the
gradient's power by layer. Two things are made of it: prices of formats (sensitivity.py), and an
importance matrix whose columns count as much as pictures depend on them:

    importance_k = sum_n E[G_nk^2], in units of the layer's mean

where the plain one is E[x_k^2]. A token that no picture reads weighs nothing here, however strong
its input is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.runtime.calibrate import layers_of
from diffquant.runtime.calibration_run import CalibrationRun
from diffquant.runtime.devices import full_float32
from diffquant.runtime.gradients import GradientPower, Power, recomputed
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.request import PictureRequest

__all__ = ["LEVELS", "Differentiated", "Level", "differentiate_pictures", "gradient_importance"]

Level: TypeAlias = Literal["pictures", "latents"]

LEVELS: tuple[Level, ...] = ("pictures", "latents")
_ROUNDING = 1e-12  # of the strongest layer: what float32 leaves of a gradient that is zero


@dataclass(frozen=True, slots=True)
class Differentiated:
    """What pictures depend on.

    Attributes:
        architecture: slug of the model.
        power: of the gradient, by canonical key; zeros where no picture depends on the layer.
        gradients: the layers, and what was collected of them.
        elements: numbers in a picture, or in its latents.
        level: which of the two.
        size: (width, height).
        warnings: as the runtime has them.
    """

    architecture: str
    power: dict[str, Power]
    gradients: GradientPower
    elements: int
    level: Level
    size: tuple[int, int]
    warnings: tuple[str, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of layers that no picture depends on."""
        return tuple(key for key, one in self.power.items() if not one.total)


def differentiate_pictures(
    model: Path,
    prompts: Sequence[str],
    *,
    level: Level = "pictures",
    progress: Progress = NO_PROGRESS,
    **run: Any,  # noqa: ANN401 (what CalibrationRun takes)
) -> Differentiated:
    """Differentiate one picture per prompt; arguments as `measure_sensitivity` has them.

    Raises:
        DiffquantError: a part, a size or a value that does not fit; or gradients not finite.
    """
    if not prompts:
        raise UsageError("no prompts to measure with")
    how = CalibrationRun(**run)
    opened = how.open(model)
    requests = how.requests(prompts, opened)
    denoiser = opened.pipeline.parts.denoiser
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
    found = {key: power.power(key) for key in power.layers}
    faint = _ROUNDING * max((one.total for one in found.values()), default=0.0)
    for key, one in found.items():
        if one.total <= faint:
            found[key] = Power(np.zeros_like(one.rows), np.zeros_like(one.columns))
    return Differentiated(
        opened.architecture,
        found,
        power,
        elements,
        level,
        (requests[0].width, requests[0].height),
        tuple(dict.fromkeys(warnings)),
    )


def gradient_importance(
    found: Differentiated, inputs: ImportanceMatrix, *, dataset: str = ""
) -> ImportanceMatrix:
    """Make an importance matrix of what pictures depend on.

    Args:
        found: the gradients' power.
        inputs: mean squared inputs of the same model, for layers that no picture depends on.
        dataset: name of the prompts.

    Returns:
        Entries with a mean of 1, counted in pictures, so that merged ones weigh by pictures.
    """
    entries = {}
    for key, entry in inputs.entries.items():
        power = found.power.get(key)
        values = entry.values().astype(np.float64)
        if power is not None and power.total:
            values = power.columns
        mean = float(values.mean())
        values = values / mean if mean else np.ones_like(values)
        count = found.gradients.pictures
        entries[key] = Entry(values[None] * count, np.array([count], np.int64))
    return ImportanceMatrix(
        entries, (dataset,) if dataset else (), found.gradients.pictures, chunk_size=1
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
