"""verify(): does a file hold what its source holds? Load, tensors, image; then one verdict.

- *load*: the candidate opens, is the same architecture, and has every weight of its source.
- *tensors*: every weight decoded and compared in canonical space. Relative RMSE up to 1.5 times the
  format's Gaussian value passes, up to 3 times warns, beyond or non-finite fails.
- *image*: the pictures of both sides are compared (compare.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.compare import ImageReport, ImageSettings, Pictures, compare_pictures
from diffquant.runtime.comparison import Value
from diffquant.runtime.gates import GateResult, judge_gate
from diffquant.runtime.providers import stand_ins_warning
from diffquant.runtime.weight_errors import (
    LoadReport,
    TensorError,
    TensorsReport,
    weigh,
    worst_of,
)

__all__ = [
    "LEVELS",
    "LoadReport",
    "TensorError",
    "TensorsReport",
    "VerifyReport",
    "verify",
    "worst_of",
]

LEVELS = ("load", "tensors", "image")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict and what it rests on; levels that were not run are None."""

    level: str
    verdict: str
    load: LoadReport
    tensors: TensorsReport | None = None
    image: ImageReport | None = None
    warnings: tuple[str, ...] = ()
    pictures: Pictures | None = None
    gates: tuple[GateResult, ...] = ()


def verify(
    candidate: Path,
    against: Path,
    *,
    level: str = "image",
    settings: ImageSettings | None = None,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
    max_rel_error: float | None = None,
) -> VerifyReport:
    """Judge `candidate` against the source it was made from.

    Args:
        candidate: any file or folder we read.
        against: its source.
        level: load, tensors or image; each includes the ones before.
        settings: for the image level.
        base: where the candidate's missing parts come from; default: `against`.
        vae: VAE file used on both sides.
        progress: told about compared weights and pictures.
        max_rel_error: gate on the relative error over quantized weights; gates on pictures are in
            `settings`.

    Raises:
        UsageError: a gate on weights at the load level.
        DiffquantError: a side cannot be read or run at all.
    """
    if max_rel_error is not None and level == "load":
        raise UsageError("--max-rel-error compares weights: use --level tensors or image")
    weighed = weigh(
        candidate,
        against,
        numbers=level != "load",
        control=max_rel_error is not None,
        progress=progress,
    )
    load, tensors = weighed.load, weighed.tensors
    verdicts = [load.verdict, *([tensors.verdict] if tensors else [])]
    gates: tuple[GateResult, ...] = ()
    if max_rel_error is not None and load.verdict != "fail":
        assert tensors is not None
        gates = (_error_gate(max_rel_error, tensors),)
        verdicts.append(gates[0].verdict)
    if level != "image" or load.verdict == "fail":
        return VerifyReport(level, worst_of(verdicts), load, tensors, gates=gates)
    settings = settings or ImageSettings()
    told: tuple[str, ...] = ()
    if weighed.alone:
        settings = _with_part(weighed.alone, candidate, against, settings, base, vae)
    else:
        settings, told = _with_stand_ins(candidate, against, settings, base, vae)
    image, pictures, warnings = compare_pictures(
        candidate, against, settings, base=base, vae=vae, progress=progress
    )
    verdicts.append(image.verdict)
    warnings = (*told, *warnings)
    return VerifyReport(level, worst_of(verdicts), load, tensors, image, warnings, pictures, gates)


def _with_stand_ins(
    candidate: Path, against: Path, settings: ImageSettings, base: Path | None, vae: Path | None
) -> tuple[ImageSettings, tuple[str, ...]]:
    """Settings for denoisers alone, where parts are nowhere to be found; and a warning of it."""
    if settings.synthetic or settings.engine != "bundled":
        return settings, ()
    told = stand_ins_warning(((against, base), (candidate, base or against)), vae)
    return (replace(settings, synthetic=True), (told,)) if told else (settings, ())


def _with_part(
    part: str,
    candidate: Path,
    against: Path,
    settings: ImageSettings,
    base: Path | None,
    vae: Path | None,
) -> ImageSettings:
    """Settings for a part alone.

    Raises:
        UsageError: pictures cannot show it, or what is asked for is about another part.
    """
    asked = (
        (settings.synthetic, "--synthetic", "it compares denoisers"),
        (settings.engine != "bundled", f"--engine {settings.engine}", "it takes no parts apart"),
        (bool(settings.loras), "--lora", "the candidate has no denoiser"),
        (settings.compute != "exact", f"--compute {settings.compute}", "it is of a denoiser"),
        (vae is not None and part == "vae", "--vae", "the candidate is the VAE"),
    )
    for given, option, why in asked:
        if given:
            raise UsageError(f"{candidate} is a {part} alone: {option} does not go with it, {why}")
    if told := stand_ins_warning(((against, base),), vae):
        raise UsageError(
            f"{candidate} is a {part} alone, and its source draws no pictures: {told}; give "
            "--base, or --level tensors"
        )
    return replace(settings, only=part)


def _error_gate(limit: float, tensors: TensorsReport) -> GateResult:
    """Judge the error over all quantized weights, or over all where none is quantized."""
    error = tensors.whole_error if tensors.error is None else tensors.error
    proof = tensors.control_error
    return judge_gate(
        "max_rel_error",
        limit,
        None if error is None else Value(error),
        control=None if proof is None else Value(proof),
        damage="rows of the largest block shifted",
        missing="no weight could be compared",
    )
