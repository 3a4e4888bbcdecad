"""What `quantize` takes as rules (--tensor-type, --exclude) and what corrections go together."""

from __future__ import annotations

import re
from pathlib import Path

from diffquant.convert.job_report import JobReport
from diffquant.core.errors import UsageError
from diffquant.quant.formats import format_named
from diffquant.quant.policy import Rule

__all__ = ["check_corrections", "corrections_of", "rules_from"]


def rules_from(tensor_types: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[Rule, ...]:
    """Read REGEX=FORMAT and REGEX.

    Raises:
        UsageError: no such pair, no regular expression, or a format that is only read.
        UnknownFormat: no such format.
    """
    rules = [Rule(_pattern(text), None, f"--exclude {text}") for text in exclude]
    for text in tensor_types:
        pattern, separator, name = text.rpartition("=")
        if not separator:
            raise UsageError(f"--tensor-type {text}: expected REGEX=FORMAT")
        fmt = format_named(name.lower())
        if not fmt.encodes:
            raise UsageError(f"--tensor-type {text}: {fmt.name} is read, not written")
        rules.append(Rule(_pattern(pattern), fmt.name, f"--tensor-type {text}"))
    return tuple(rules)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise UsageError(f"{text}: not a regular expression: {error}") from None
    return text


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
