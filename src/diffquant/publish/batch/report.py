"""What a batch planned or did, as plain data: a row per output, and totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.publish.batch.planning import DONE, TO_COMPARE, BatchPlan, Planned
from diffquant.publish.batch.pool import Ended
from diffquant.publish.batch.record import Record, read_record, record_path

__all__ = ["BatchReport", "JobRow", "OutputRow", "batch_report"]

_GATE = 3
_FAILED = 1


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One output.

    Attributes:
        name: relative to the output folder.
        state: what was found: "done", or what had to be done and why.
        result: done before, written, compared, failed; of a dry run: done, to do.
        nbytes: of the file; planned bytes of its tensors where it is not written.
        error: relative RMSE, None where nothing was measured.
        verdict: pass, warn or fail: the worse of weights and pictures; None where not judged.
        psnr_db: of pictures, None without them or where they are identical.
        message: why it failed.
        notes: what the choice of formats under a budget rests on.
    """

    name: str
    path: str
    source: str
    type: str
    target: str
    state: str
    result: str
    nbytes: int
    bits_per_weight: float
    error: float | None = None
    verdict: str | None = None
    psnr_db: float | None = None
    message: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRow:
    """One pass: what it takes, and how it ended; `gpu` is "" for none."""

    label: str
    outputs: int
    threads: int
    peak_nbytes: int
    gpu: str
    code: int
    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch.

    Attributes:
        nbytes: of all outputs.
        needed_nbytes: of those that are or were to be written.
        free_nbytes: on the disk of the output folder, before.
        where: what ran the jobs: "processes", or Ray's address.
        exit_code: the worst of all outputs.
    """

    plan: str
    output: str
    dry_run: bool
    outputs: tuple[OutputRow, ...]
    jobs: tuple[JobRow, ...]
    nbytes: int
    needed_nbytes: int
    free_nbytes: int
    processes: int
    threads: int
    memory_nbytes: int
    gpus: tuple[str, ...]
    where: str
    exit_code: int
    notes: tuple[str, ...] = ()


def batch_report(
    plan: BatchPlan,
    ended: Sequence[Ended],
    *,
    dry_run: bool,
    processes: int,
    threads: int,
    memory_nbytes: int,
    gpus: tuple[str, ...],
    where: str,
    notes: tuple[str, ...] = (),
) -> BatchReport:
    """Read the journal again, and say what became of every output."""
    ends = {item.name: one for one in ended for item in (*one.job.write, *one.job.judge)}
    rows = []
    codes = [one.code for one in ended]
    for planned in plan.outputs:
        name = planned.item.name
        record = planned.record
        if not dry_run and planned.state != DONE:
            record = read_record(record_path(plan.file.output, name))
        row = _row(planned, record, ends.get(name), dry_run=dry_run)
        rows.append(row)
        codes += [_GATE] if row.verdict == "fail" else []
        codes += [_FAILED] if row.result == "failed" else []
    jobs = ended or [Ended(job) for job in plan.jobs]
    return BatchReport(
        plan=str(plan.file.path),
        output=str(plan.file.output),
        dry_run=dry_run,
        outputs=tuple(rows),
        jobs=tuple(_job(one) for one in jobs),
        nbytes=plan.nbytes,
        needed_nbytes=plan.needed_nbytes,
        free_nbytes=plan.free_nbytes,
        processes=processes,
        threads=threads,
        memory_nbytes=memory_nbytes,
        gpus=gpus,
        where=where,
        exit_code=max(codes, default=0),
        notes=notes,
    )


def _job(one: Ended) -> JobRow:
    job = one.job
    count = len(job.write) + len(job.judge)
    return JobRow(
        job.label, count, job.threads, job.peak_nbytes, job.gpu, one.code, one.seconds, one.message
    )


def _row(planned: Planned, record: Record | None, end: Ended | None, *, dry_run: bool) -> OutputRow:
    """One output: what its record says, where that is of what is asked for."""
    item, report = planned.item, planned.job
    if planned.state == DONE:
        result = "done" if dry_run else "done before"
    elif dry_run:
        result = "to do"
    else:
        result = _result(planned, record)
    whole = record if record is not None and result not in ("failed", "to do") else None
    told: Mapping[str, object] = whole.report if whole is not None else {}
    pictures: Mapping[str, object] = {}
    if whole is not None and planned.pictures:
        pictures = whole.pictures or {}
    verdicts = [told.get("verdict"), pictures.get("verdict")]
    return OutputRow(
        name=item.name,
        path=str(item.path),
        source=report.source,
        type=item.type,
        target=report.target,
        state=planned.state,
        result=result,
        nbytes=whole.nbytes if whole is not None else report.nbytes,
        bits_per_weight=report.bits_per_weight,
        error=_number(told.get("error")),
        verdict=next((one for one in ("fail", "warn", "pass") if one in verdicts), None),
        psnr_db=_number(pictures.get("psnr_db")),
        message=end.message if end is not None and result == "failed" else "",
        warnings=(*_texts(told), *_texts(pictures)),
        notes=planned.notes,
    )


def _result(planned: Planned, record: Record | None) -> str:
    """What became of an output that was not done."""
    if record is None or not record.done or record.identity != planned.identity:
        return "failed"
    if planned.pictures and (record.pictures or {}).get("identity") != planned.pictures:
        return "failed"
    return "compared" if planned.state == TO_COMPARE else "written"


def _texts(told: Mapping[str, object]) -> list[str]:
    found = told.get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
