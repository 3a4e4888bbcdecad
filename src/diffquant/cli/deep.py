"""The work of `inspect --deep` and `inspect --hash`; view_health.py renders it."""

from __future__ import annotations

from collections.abc import Sequence

from diffquant.cli.frame import Options, Outcome
from diffquant.core.errors import DiffquantError
from diffquant.inspect.hashes import hash_paths
from diffquant.inspect.health import HealthReport, health
from diffquant.inspect.lora import describe_lora
from diffquant.inspect.subject import open_subject

__all__ = ["deep", "hashes"]

_DAMAGED = 3


def deep(files: Sequence[str], options: Options) -> Outcome:
    """Look at every number of each file; one that cannot be read does not hide the others.

    Raises:
        CheckpointError: the only file cannot be read.
    """
    reports: list[HealthReport] = []
    failures: list[DiffquantError] = []
    warnings: list[str] = []
    for path in files:
        try:
            with open_subject(path) as subject:
                reports.append(health(subject, workers=options.threads, progress=options.bar()))
                lora = describe_lora(subject, deep=True) if subject.kind == "lora" else None
                warnings += [f"{path}: {text}" for text in (lora.warnings if lora else ())]
        except DiffquantError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    damaged = _DAMAGED if any(report.errors for report in reports) else 0
    code = max((error.exit_code for error in failures), default=0)
    return Outcome(
        {"health": reports},
        warnings,
        max(code, damaged),
        ok=not damaged and not failures,
        errors=[str(error) for error in failures],
    )


def hashes(files: Sequence[str], options: Options) -> Outcome:
    """Hash each file.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = hash_paths(files, workers=options.threads, progress=options.bar())
    return Outcome({"hashes": found})
