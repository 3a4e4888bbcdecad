"""A job: outputs of one model that are made in one pass, and the function that makes them.

The same function runs in a process of this machine and as a task of Ray: a job is plain data, and
everything it leaves is in the output folder, noted in the journal output by output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.allocation_choice import Choice
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import run_job
from diffquant.convert.lora.merge import merging
from diffquant.convert.recipe_source import load_recipe
from diffquant.convert.request import Request
from diffquant.convert.several import Wanted, run_jobs
from diffquant.convert.user_rules import user_rules
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.imatrix import merge_imatrices, read_imatrix
from diffquant.io.inputs import open_inputs
from diffquant.io.kept import journal_path, kept_path
from diffquant.io.prompt_file import read_prompts
from diffquant.publish.batch.items import Item
from diffquant.publish.batch.record import (
    Record,
    digest_of,
    locked,
    read_record,
    record_path,
    write_record,
)
from diffquant.publish.batch.settings import Settings
from diffquant.quant.types import type_named

__all__ = ["Job", "Made", "convert", "run"]

_ORPHAN_S = 60.0  # what a killed run's process may take to finish a write


@dataclass(frozen=True, slots=True)
class Job:
    """Outputs of one model, for one process.

    Attributes:
        label: what messages call it.
        folder: the batch's output folder.
        settings: of the model.
        write: outputs to make in one pass.
        judge: outputs that are whole, and only to be compared by pictures.
        identities: an output's name -> what its bytes depend on.
        pictures: what a comparison by pictures depends on; "" for none.
        threads: of this job.
        peak_nbytes: predicted memory.
        nbytes: of all outputs to be written.
        gpu: index of the GPU it has to itself, "" for none.
        choices: an output's name -> formats that its budget was spent on.
    """

    label: str
    folder: Path
    settings: Settings
    write: tuple[Item, ...]
    judge: tuple[Item, ...]
    identities: dict[str, dict[str, str]]
    pictures: str = ""
    threads: int = 1
    peak_nbytes: int = 0
    nbytes: int = 0
    gpu: str = ""
    choices: dict[str, Choice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """What a job plans or made of its outputs: reports in the order of the items.

    Attributes:
        peak_nbytes: predicted memory of the pass.
        read_nbytes: of weights, for all of them together.
        warnings: of the pass.
        choices: an output's name -> formats that its budget was spent on.
    """

    reports: tuple[JobReport, ...]
    peak_nbytes: int
    read_nbytes: int
    warnings: tuple[str, ...]
    choices: dict[str, Choice]


def run(job: Job, progress: Progress = NO_PROGRESS) -> None:
    """Make a job's outputs, judge them, and note each.

    Raises:
        DiffquantError: outputs noted before it stay.
        KeyboardInterrupt: as for run_job.
    """
    items = (*job.write, *job.judge)
    with contextlib.ExitStack() as stack:
        for name in sorted(item.name for item in items):
            lock = record_path(job.folder, name).with_suffix(".lock")
            stack.enter_context(locked(lock, name, wait_s=_ORPHAN_S))
        if job.write:
            _write(job, progress)
        if job.pictures and items:
            _judge(job, items, progress)


def _write(job: Job, progress: Progress) -> None:
    for item in job.write:
        item.path.parent.mkdir(parents=True, exist_ok=True)
        path = record_path(job.folder, item.name)
        if len(job.write) > 1 and read_record(path) is not None:
            # a stopped run that made this one alone; one pass for several cannot go on with it
            journal_path(item.path).unlink(missing_ok=True)
            kept_path(item.path).unlink(missing_ok=True)
        write_record(path, Record(job.identities[item.name], choice=job.choices.get(item.name)))
    made = convert(
        job.settings, job.write, threads=job.threads, progress=progress, choices=job.choices
    )
    for item, report in zip(job.write, made.reports, strict=True):
        nbytes, sha256 = digest_of(item.path)
        told = {
            "bits_per_weight": report.bits_per_weight,
            "error": report.error,
            "verdict": report.verdict,
            "warnings": list(report.warnings),
        }
        record = Record(
            job.identities[item.name], True, nbytes, sha256, told, None, job.choices.get(item.name)
        )
        write_record(record_path(job.folder, item.name), record)


def convert(
    settings: Settings,
    items: Sequence[Item],
    *,
    threads: int | None = None,
    dry_run: bool = False,
    choices: Mapping[str, Choice] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Made:
    """Plan or write outputs of one model in one pass over it; what is there is replaced.

    A single file continues where a stopped run left it (convert/resume.py). A budget without a
    choice in `choices` is spent here.
    """
    source = Path(settings.source)
    matrix = [read_imatrix(path) for path in settings.imatrix]
    given: dict[str, Any] = {
        "base": settings.base,
        "force": True,
        "dry_run": dry_run,
        "workers": threads,
        "verify": "tensors" if settings.verify == "image" else settings.verify,
        "progress": progress,
        "matrix": merge_imatrices(matrix) if matrix else None,
    }
    measured: Any = contextlib.nullcontext()
    if settings.inputs is not None:
        measured = open_inputs(settings.inputs)
    with (
        measured as inputs,
        merging(
            source, settings.lora, arch=settings.arch, allow_missing=settings.allow_missing
        ) as merge,
    ):
        given |= {"inputs": inputs, "beside": merge.paths}
        requests = [merge.into(_request(settings, item)) for item in items]
        spent = _choices(settings, items, requests, dict(choices or {}), given)
        requests = [
            spent[item.name].into(one) if item.name in spent else one
            for item, one in zip(items, requests, strict=True)
        ]
        if len(items) > 1:
            wanted = [Wanted(item.path, one) for item, one in zip(items, requests, strict=True)]
            several = merge.told_each(run_jobs(source, wanted, **given))
            told = several.warnings
            return Made(several.outputs, several.peak_nbytes, several.read_nbytes, told, spent)
        (item,), (request,) = items, requests
        here = isinstance(settings.source, Path)
        resume = not dry_run and request.container != "folder" and here
        report = merge.told(run_job(source, item.path, request, resume=resume, **given))
    return Made((report,), report.peak_nbytes, report.read_nbytes, report.warnings, spent)


def _choices(
    settings: Settings,
    items: Sequence[Item],
    requests: Sequence[Request],
    known: Mapping[str, Choice],
    given: Mapping[str, Any],
) -> dict[str, Choice]:
    """The formats of every output under a budget; `given` is run_job's."""
    found = {}
    for item, request in zip(items, requests, strict=True):
        budget = item.want.budget
        if budget is None:
            continue
        if item.name in known:
            found[item.name] = known[item.name]
            continue
        found[item.name] = allocate_bits(
            Path(settings.source),
            request,
            budget,
            sensitivity=item.want.sensitivity,
            **{name: given[name] for name in ("matrix", "inputs", "base", "workers", "progress")},
        ).choice
    return found


def _request(settings: Settings, item: Item) -> Request:
    return Request(
        container=item.container,
        type=type_named(item.want.type) if item.want.type else None,
        recipe=load_recipe(item.want.recipe) if item.want.recipe is not None else None,
        parts=settings.parts,
        all_parts=settings.all_parts,
        rules=user_rules(settings.tensor_types, settings.exclude),
        pure=settings.pure,
        allow_requantize=settings.allow_requantize,
        target=item.target,
        policy=settings.policy,
        rounding=settings.rounding,
        bias_correction=settings.bias_correction,
        arch=settings.arch,
    )


def _judge(job: Job, items: Sequence[Item], progress: Progress) -> None:
    """Compare outputs with their source by pictures; the source draws once for all of them."""
    from diffquant.runtime.compare import ImageSettings, compare_pictures, make_reference

    settings = ImageSettings(device="cuda" if job.gpu else "cpu")
    if job.settings.prompts is not None:
        settings = replace(settings, prompts=read_prompts(job.settings.prompts))
    source = Path(job.settings.source)
    reference = make_reference(source, settings, progress=progress)
    for item in items:
        report, _, notes = compare_pictures(
            item.path, source, settings, progress=progress, reference=reference
        )
        path = record_path(job.folder, item.name)
        found = read_record(path)
        assert found is not None, "written by this job, or by one that it continues"
        told = {
            "identity": job.pictures,
            "verdict": report.verdict,
            "psnr_db": report.psnr_db,
            "warnings": list(notes),
        }
        write_record(path, replace(found, pictures=told))
