"""The denoiser's stage by itself: what a device must hold for its steps, other parts off it."""

from __future__ import annotations

from diffquant.convert.footprint.levels import CONTEXT_NBYTES, moment_nbytes, on_device
from diffquant.convert.footprint.stages import Footprint, Stage

__all__ = ["denoise_stage", "denoising_nbytes", "others_over"]

_CONTEXT = CONTEXT_NBYTES["cuda"]
_GIB = 1 << 30


def denoise_stage(found: Footprint) -> Stage | None:
    """The stage in which the denoiser works; None where it could not be estimated."""
    return next((stage for stage in found.stages if stage.name == "denoise"), None)


def denoising_nbytes(found: Footprint) -> int:
    """Bytes on a GPU while the denoiser works: its weights, activations, one weight decoded.

    Small parameters of other parts stay there, as at level model, and so does the context.
    """
    stage = denoise_stage(found)
    assert stage is not None
    weights = on_device("model", found.stages, stage)
    return weights + stage.activations.nbytes + stage.scratch + _CONTEXT


def others_over(found: Footprint, budget: int) -> tuple[str, ...]:
    """Which other part is too large for a budget by itself, in a line; nothing where none is."""
    stages = [stage for stage in found.stages if stage.name != "denoise"]
    largest = max(stages, key=lambda one: _alone(found, one), default=None)
    over = _alone(found, largest) - budget if largest is not None else 0
    if largest is None or over <= 0:
        return ()
    return (
        f"{largest.name}: {largest.title} takes {over / _GIB:.2f} GiB more than that by itself; it "
        "has to be streamed, or stored in fewer bits",
    )


def _alone(found: Footprint, stage: Stage) -> int:
    moment = moment_nbytes(stage, "strips")
    return on_device("model", found.stages, stage) + moment + stage.scratch + _CONTEXT
