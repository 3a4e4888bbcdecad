"""Which corrections of `quantize` go together, and what a recipe says of them."""

from __future__ import annotations

from pathlib import Path

from diffquant.convert.job_report import JobReport
from diffquant.core.errors import UsageError

__all__ = ["check_corrections", "corrections_of"]


def check_corrections(
    inputs: Path | None, error_lora: Path | None, rank: int | None, *, bias: bool
) -> None:
    """Refuse corrections that do not fit together.

    Raises:
        UsageError: says which.
    """
    if bias and inputs is None:
        raise UsageError(
            "--bias-correction needs the mean inputs of layers: make them with `diffquant "
            "calibrate --inputs FILE`, and give --inputs FILE"
        )
    if bias and error_lora is not None:
        raise UsageError(
            "--bias-correction and --error-lora each make up for the mean of the same error, and "
            "would do so twice; choose one"
        )
    if rank is not None and error_lora is None:
        raise UsageError("--rank is that of the error LoRA: give --error-lora FILE too")


def corrections_of(report: JobReport) -> str:
    """What a recipe does not repeat, as comments: it gives formats, and no statistics."""
    told = [one for one in report.notes if one.startswith(("biases of ", "error LoRA "))]
    return "".join(f"# {one}\n" for one in told)
