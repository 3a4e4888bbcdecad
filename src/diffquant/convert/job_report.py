"""What a job planned or did, as frozen data: per weight, per part, and in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.engine import StepResult
from diffquant.convert.lora.error_plan import ErrorLoraReport
from diffquant.convert.lora.merge_report import MergeReport
from diffquant.convert.losses import broken_pictures
from diffquant.convert.plan import Plan
from diffquant.convert.resume import Resumed
from diffquant.quant.formats import FORMATS
from diffquant.quant.metrics import verdict_of

__all__ = ["JobReport", "PartTotal", "TensorRow", "job_report"]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One weight of the output.

    `error` is its relative RMSE, None where bytes were copied; `weighted_error` that of the layer's
    output on measured inputs, where it was rounded by feedback; `encoder` what encoded it, "cpu" or
    "cuda", "" where nothing was.
    """

    key: str
    target: str
    part: str
    stored: str
    reason: str
    parameters: int
    nbytes: int
    passes: int
    error: float | None = None
    verdict: str | None = None
    rounding: str = "nearest"
    weighted_error: float | None = None
    encoder: str = ""


@dataclass(frozen=True, slots=True)
class PartTotal:
    """Totals of one part; `formats` maps what weights are stored as to how many weights."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    bits_per_weight: float
    formats: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a quantize or convert run planned or did.

    Attributes:
        output: path written, or planned.
        nbytes: bytes of all tensors written.
        bits_per_weight: of the denoiser, or of everything where there is none; scales included.
        parts: totals per part.
        tensors: every weight, in file order.
        dropped: source key -> why it is not in the output.
        peak_nbytes: predicted working memory.
        error: relative RMSE over all quantized weights, weighted by size, None in a dry run.
        verdict: pass, warn or fail at tensor level, None when not checked.
        target: the program the output is written for.
        policy: whose choice the formats are.
        notes: what the target gives up against another.
        rounding: as asked for; rows say where it was used.
        continued: weights taken over from an interrupted run.
        error_lora: the LoRA of the quantization error that was written beside, or is planned.
        merged: what became of the LoRAs merged into it.
    """

    output: str
    source: str
    architecture: str
    variant: str
    type: str
    container: str
    dry_run: bool
    nbytes: int
    bits_per_weight: float
    parts: tuple[PartTotal, ...]
    tensors: tuple[TensorRow, ...]
    dropped: Mapping[str, str]
    missing: tuple[str, ...]
    read_nbytes: int
    peak_nbytes: int
    workers: int
    mixed: bool
    verify: str
    error: float | None
    verdict: str | None
    continued: int
    warnings: tuple[str, ...]
    target: str = ""
    policy: str = ""
    notes: tuple[str, ...] = ()
    rounding: str = "nearest"
    error_lora: ErrorLoraReport | None = None
    merged: MergeReport | None = None


def job_report(
    src: Path,
    out: Path,
    plan: Plan,
    done: Resumed,
    missing: tuple[str, ...],
    notes: tuple[str, ...],
    memory: int,
    workers: int,
    verify: str,
    dry_run: bool,
) -> JobReport:
    """What a plan says, and what `done` measured of it.

    Args:
        src: the source.
        out: the output.
        plan: as made.
        done: results per step; empty in a dry run.
        missing: what a folder output lacks.
        notes: further warnings.
        memory: predicted, bytes.
        workers: threads.
        verify: as asked for.
        dry_run: whether nothing was written.
    """
    rows, results = [], done.results
    for index, step in enumerate(plan.steps):
        error = results[index].error if results else None
        gaussian = FORMATS[step.stored].gaussian_error if step.stored in FORMATS else 0.0
        judged = error is not None and step.decision.format and not FORMATS[step.stored].is_cast
        rows.append(
            TensorRow(
                key=step.key,
                target=step.target,
                part=step.part,
                stored=step.stored,
                reason=step.decision.reason,
                parameters=step.parameters,
                nbytes=step.nbytes,
                passes=step.passes,
                error=error,
                verdict=_verdict(results[index], gaussian) if judged else None,
                rounding=step.rounding,
                weighted_error=results[index].weighted if results else None,
                encoder=step.encoder if step.decision.format else "",
            )
        )
    weighed = [(step.stored, row.error) for step, row in zip(plan.steps, rows, strict=True)]
    verdicts = {row.verdict for row in rows if row.verdict}
    worst = next((v for v in ("fail", "warn", "pass") if v in verdicts), None)
    if results and verify == "tensors" and worst is None:
        worst = "pass"
    return JobReport(
        output=str(out),
        source=str(src),
        architecture=plan.architecture,
        variant=plan.variant,
        type=plan.request.type.name if plan.request.type else (plan.request.dtype or ""),
        container=plan.request.container,
        dry_run=dry_run,
        nbytes=plan.nbytes,
        bits_per_weight=plan.bits_per_weight(),
        parts=_totals(plan),
        tensors=tuple(rows),
        dropped=dict(plan.dropped),
        missing=missing,
        read_nbytes=plan.read_nbytes,
        peak_nbytes=memory,
        workers=workers,
        mixed=plan.mixed,
        verify=verify if not dry_run else "none",
        error=_overall(rows),
        verdict=worst if verify == "tensors" else None,
        continued=done.continued,
        warnings=plan.warnings + done.warnings + notes + broken_pictures(weighed),
        target=plan.target,
        policy=plan.policy,
        notes=(*plan.notes, *_judged_by_outputs(rows)),
        rounding=plan.request.rounding,
    )


def _verdict(result: StepResult, gaussian: float) -> str | None:
    """Judge a weight; feedback trades its error for that of the layer's output, which is judged.

    Its weight error is larger by design, up to 1.5 times the format's; past 3 times it still fails.
    """
    if result.error is None:
        return None
    plain = verdict_of(result.error, gaussian)
    if result.weighted is None or plain == "fail":
        return plain
    return verdict_of(result.weighted, gaussian)


def _judged_by_outputs(rows: Sequence[TensorRow]) -> tuple[str, ...]:
    count = sum(row.weighted_error is not None and row.verdict is not None for row in rows)
    if not count:
        return ()
    return (
        f"{count} weights rounded by feedback are judged by their layers' outputs on the inputs "
        "that were measured, which flatters them; pictures tell: `diffquant verify`",
    )


def _totals(plan: Plan) -> tuple[PartTotal, ...]:
    totals = []
    for name in dict.fromkeys(step.part for step in plan.steps):
        steps = plan.part_steps(name)
        formats: dict[str, int] = {}
        for step in steps:
            formats[step.stored] = formats.get(step.stored, 0) + step.parameters
        totals.append(
            PartTotal(
                name=name or "other",
                tensors=len(steps),
                parameters=sum(step.parameters for step in steps),
                nbytes=sum(step.nbytes for step in steps),
                bits_per_weight=plan.bits_per_weight(name),
                formats=formats,
            )
        )
    return tuple(totals)


def _overall(rows: list[TensorRow]) -> float | None:
    judged = [(row.error, row.parameters) for row in rows if row.verdict and row.error is not None]
    weights = sum(count for _, count in judged)
    if not weights:
        return None
    # sqrt of the mean squared relative error: each tensor counts by its number of weights
    return float((sum(error**2 * count for error, count in judged) / weights) ** 0.5)
