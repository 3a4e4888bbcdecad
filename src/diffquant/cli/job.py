"""What `quantize` and `convert` share: rendering a JobReport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from diffquant.cli.frame import echo, human, table
from diffquant.cli.merging import render_merge
from diffquant.convert.allocation_report import AllocationReport
from diffquant.convert.job_report import JobReport, TensorRow
from diffquant.convert.lora.error_plan import ErrorLoraReport
from diffquant.core.report import to_json

__all__ = ["JobOutcome", "render_job", "resumable", "worst_of"]

_WORST = 5
_POLICIES = {
    "published": "published (the peers' mix)",
    "uniform": "uniform (ours: no mix is published for this type)",
    "tuned": "tuned (ours)",
    "recipe": "as the recipe says",
    "allocated": "allocated (ours: least predicted error at this size)",
    "encoder": "encoder (ours: the type's mix, token embedding q6_k or better)",
}


def resumable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --resume."""
    return click.option(
        "--resume",
        is_flag=True,
        help="When interrupted, keep what is finished; continue what an earlier run kept. With "
        "--force, start over where that was another conversion. Single files only.",
    )(function)


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """A job, its pictures' verdict and its allocation; in JSON fields among those of the job."""

    job: JobReport
    image: dict[str, Any] | None = None
    allocation: AllocationReport | None = None

    def to_json(self) -> dict[str, Any]:
        """The flat object that others rely on."""
        found = {**to_json(self.job), "image": self.image}
        if self.allocation is not None:
            found["allocation"] = to_json(self.allocation)
        return found


def render_job(report: JobReport, *, verbose: bool = False) -> None:
    """Print a plan or a result: parts, formats and reasons, errors, verdict."""
    verb = "would write" if report.dry_run else "wrote"
    name = report.architecture + (f" {report.variant}" if report.variant else "")
    what = f" as {report.type}" if report.type else ""
    echo(f"{verb} {report.output}")
    echo(f"  {name}{what}, {human(report.nbytes)}, {report.bits_per_weight:.2f} bits per weight")
    policy = f", policy {_POLICIES.get(report.policy, report.policy)}" if report.policy else ""
    echo(f"  for {report.target}{policy}")
    if report.continued:
        echo(f"  continued: {report.continued} of {len(report.tensors)} weights were finished")
    echo()
    table(
        ("part", "tensors", "parameters", "size", "bits/weight", "stored as"),
        [
            (
                part.name,
                str(part.tensors),
                f"{part.parameters:,}",
                human(part.nbytes),
                f"{part.bits_per_weight:.2f}",
                _mix(part.formats, part.parameters),
            )
            for part in report.parts
        ],
        right=(1, 2, 3, 4),
    )
    echo()
    _render_reasons(report, verbose=verbose)
    if report.dropped:
        reasons: dict[str, int] = {}
        for reason in report.dropped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        for reason, count in reasons.items():
            echo(f"  not written: {count} tensors ({reason})")
    if report.merged is not None:
        render_merge(report.merged, verbose=verbose)
    for note in report.notes:
        echo(f"  {note}")
    if report.dry_run:
        echo(
            f"  reads {human(report.read_nbytes)}, working memory about "
            f"{human(report.peak_nbytes)} with {report.workers} threads"
        )
    if report.error_lora is not None and report.error_lora.error is not None:
        _render_lora(report.error_lora)
    if report.verdict is not None:
        error = f", relative error {report.error:.4f}" if report.error is not None else ""
        echo(f"  verified ({report.verify}): {report.verdict}{error}")


def _render_lora(lora: ErrorLoraReport) -> None:
    gain = lora.weighed_gain_db
    outputs = "" if gain is None else f", {gain:.1f} dB less in their outputs (inputs as measured)"
    echo(f"  wrote {lora.output}, {human(lora.nbytes)}")
    echo(
        f"  its layers' relative error {lora.error:.4f} becomes {lora.corrected_error:.4f} with it"
        f"{outputs}"
    )


def _render_reasons(report: JobReport, *, verbose: bool) -> None:
    main = [row for row in report.tensors if row.part in ("denoiser", "")]
    title, rows = ("denoiser", main) if main else ("stored as", list(report.tensors))
    if verbose:
        table(
            ("tensor", "stored", "error", "reason"),
            [(row.key, row.stored, _error(row.error), row.reason) for row in rows],
            right=(2,),
        )
        return
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.stored, row.reason), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: -sum(row.nbytes for row in item[1]))
    table(
        (title, "tensors", "size", "error", "why"),
        [
            (
                stored,
                str(len(found)),
                human(sum(row.nbytes for row in found)),
                _error(max((row.error for row in found if row.error is not None), default=None)),
                reason,
            )
            for (stored, reason), found in ordered
        ],
        right=(1, 2, 3),
    )
    for row in worst_of(rows)[:_WORST]:
        echo(f"  {row.verdict}: {row.key} {row.stored} error {row.error:.4f}")


def worst_of(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """Weights whose error is past what their format should cost, the largest first."""
    judged = (row for row in rows if row.verdict in ("warn", "fail"))
    return sorted(judged, key=lambda row: -(row.error or 0))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mix(formats: Any, total: int) -> str:  # noqa: ANN401 - Mapping[str, int]
    rows = sorted(formats.items(), key=lambda row: -row[1])
    return ", ".join(f"{name} {count / max(total, 1):.1%}" for name, count in rows[:4])
