"""What a batch has to do: every output is planned, compared with the journal, and put into a job.

Nothing is written here. All models are planned before the first is worked on, so that a type that
a target cannot read, a file that is no checkpoint or a full disk shows before hours of work; all of
it is told at once.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from diffquant import __version__
from diffquant.convert.job_report import JobReport
from diffquant.convert.output import fingerprint
from diffquant.convert.resume import stamps
from diffquant.convert.sensitivity import find_sensitivity
from diffquant.core.errors import DiffquantError, ResourceError, UsageError
from diffquant.core.failures import explain
from diffquant.io import open_source
from diffquant.publish.batch.items import Item, items_of
from diffquant.publish.batch.job import Job, convert
from diffquant.publish.batch.plan_file import BatchFile, Model
from diffquant.publish.batch.record import Record, digest_of, read_record, record_path
from diffquant.publish.batch.settings import Settings

__all__ = ["DONE", "TO_COMPARE", "BatchPlan", "Planned", "make_batch_plan"]

DONE = "done"
TO_COMPARE = "pictures to be compared"
_FOREIGN = "there, and not of this batch"
# Neither changes an output's bytes: `types` and `targets` say which outputs there are.
_OF_THE_TABLE = ("source", "name", "types", "targets", "container", "verify", "prompts")
_FLOAT32_NBYTES = 4
_SIDES = 2  # source and output are in memory together while they are compared


@dataclass(frozen=True, slots=True)
class Planned:
    """One output as it was found.

    Attributes:
        state: DONE, or what is to be done and why: "new", "changed: source files", ...
        record: what an earlier run noted.
        job: a dry run's report of it.
        identity: what its bytes depend on now.
        pictures: what a comparison by pictures depends on; "" where none is asked for.
        notes: what a budget's choice rests on.
    """

    item: Item
    state: str
    record: Record | None
    job: JobReport
    identity: Mapping[str, str]
    pictures: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Everything a batch has to do.

    Attributes:
        outputs: in the order of the file.
        jobs: for each model that has something to do one per importance matrix.
        nbytes: of all outputs.
        needed_nbytes: of those to be written.
        free_nbytes: on the disk of the output folder.
    """

    file: BatchFile
    outputs: tuple[Planned, ...]
    jobs: tuple[Job, ...]
    nbytes: int
    needed_nbytes: int
    free_nbytes: int


def make_batch_plan(file: BatchFile, *, threads: int, force: bool = False) -> BatchPlan:
    """Plan every model, and find out what is done.

    Args:
        file: from read_plan_file.
        threads: of each job.
        force: do all of it again, and replace what is no batch's output.

    Raises:
        DiffquantError: of all models' problems, with the exit code of the worst.
        ResourceError: the disk cannot hold what is to be written.
    """
    items = items_of(file)
    outputs: list[Planned] = []
    jobs: list[Job] = []
    problems: list[BaseException] = []
    told: list[str] = []
    for model, row in zip(file.models, items, strict=True):
        found: list[Planned] = []
        for one, some in _passes(model, row):
            try:
                planned, job = _plan_model(file, one, some, threads=threads, force=force)
            except (DiffquantError, OSError) as error:
                problems.append(error)
                told.append(f"{model.where}: {explain(error)[1]}")
                continue
            found += planned
            jobs += [job] if job is not None else []
        outputs += sorted(found, key=lambda one: row.index(one.item))
    foreign = [one.item.path.name for one in outputs if one.state == _FOREIGN]
    if foreign and not problems:
        problems.append(UsageError())
        told.append(
            f"{', '.join(foreign)}: there already, and not made by this batch; use --force to "
            "replace, or write elsewhere"
        )
    if problems:
        raise _worst(problems, f"{file.path}: {'; '.join(told)}")
    free = shutil.disk_usage(next(one for one in _above(file.output) if one.exists())).free
    needed = sum(job.nbytes for job in jobs)
    if needed > free:
        raise ResourceError(
            f"{file.output}: needs {needed} bytes for what is to be written, {free} bytes are "
            f"free: free {needed - free} bytes or write elsewhere"
        )
    total = sum(one.job.nbytes for one in outputs)
    return BatchPlan(file, tuple(outputs), tuple(jobs), total, needed, free)


def _worst(problems: Sequence[BaseException], message: str) -> DiffquantError:
    """One error for all, with the exit code of the worst."""
    code = max(explain(error)[0] for error in problems)
    worst = DiffquantError(message)
    worst.exit_code = code
    return worst


def _above(folder: Path) -> tuple[Path, ...]:
    absolute = folder.absolute()
    return (absolute, *absolute.parents)


def _passes(model: Model, items: Sequence[Item]) -> list[tuple[Model, tuple[Item, ...]]]:
    """Outputs that one pass over the source makes: those that weigh errors by the same matrix."""
    passes: dict[tuple[Path, ...], list[Item]] = {}
    for item in items:
        passes.setdefault(item.want.imatrix or model.settings.imatrix, []).append(item)
    return [
        (replace(model, settings=replace(model.settings, imatrix=matrix)), tuple(some))
        for matrix, some in passes.items()
    ]


def _plan_model(
    file: BatchFile, model: Model, items: Sequence[Item], *, threads: int, force: bool
) -> tuple[list[Planned], Job | None]:
    settings = model.settings
    source = _source_facts(settings)
    identities = {item.name: _identity(settings, item, source) for item in items}
    records = {item.name: read_record(record_path(file.output, item.name)) for item in items}
    known = {
        name: record.choice
        for name, record in records.items()
        if record is not None and record.choice is not None
        if record.identity == identities[name] and not force
    }
    made = convert(settings, items, threads=threads, dry_run=True, choices=known)
    pictures = _picture_identity(settings) if settings.verify == "image" else ""
    outputs = []
    for item, report in zip(items, made.reports, strict=True):
        name, record = item.name, records[item.name]
        state = _state(item, record, identities[name], pictures, force=force)
        notes = made.choices[name].notes if name in made.choices else ()
        outputs.append(Planned(item, state, record, report, identities[name], pictures, notes))
    write = [one for one in outputs if one.state not in (DONE, TO_COMPARE)]
    judge = tuple(one.item for one in outputs if one.state == TO_COMPARE)
    if not write and not judge:
        return outputs, None
    if 0 < len(write) < len(items):  # what is left needs less
        left = [one.item for one in write]
        made = convert(settings, left, threads=threads, dry_run=True, choices=made.choices)
    peak = made.peak_nbytes
    if pictures:
        peak = max(peak, _SIDES * _FLOAT32_NBYTES * source.parameters)
    own = items[0].want.imatrix  # told apart from other passes over the model
    job = Job(
        label=" ".join((model.where, settings.name, *(f"with {one.name}" for one in own))),
        folder=file.output,
        settings=settings,
        write=tuple(one.item for one in write),
        judge=judge,
        identities=identities,
        choices={
            one.item.name: made.choices[one.item.name] for one in write if one.item.want.budget
        },
        pictures=pictures,
        threads=threads,
        peak_nbytes=peak,
        nbytes=sum(one.job.nbytes for one in write),
    )
    return outputs, job


def _state(
    item: Item, record: Record | None, identity: dict[str, str], pictures: str, *, force: bool
) -> str:
    """Whether an output is done, or why it is not."""
    exists = item.path.exists()
    if force:
        return "again: --force" if exists else "new"
    if record is None:
        return _FOREIGN if exists else "new"
    if not record.identity:
        return "again: its record is damaged"
    changed = [name for name in identity if record.identity.get(name) != identity[name]]
    changed += [name for name in record.identity if name not in identity]
    if changed:
        return f"again: changed: {', '.join(changed)}"
    if not record.done:
        return "unfinished"
    if not exists:
        return "again: it is gone"
    if digest_of(item.path) != (record.nbytes, record.sha256):
        return "again: its bytes are not what was written"
    if pictures and (record.pictures or {}).get("identity") != pictures:
        return TO_COMPARE
    return DONE


@dataclass(frozen=True, slots=True)
class _Source:
    """What is known of a source: `fingerprint` of samples, `files` by size and time of change."""

    fingerprint: str
    files: str
    parameters: int


def _source_facts(settings: Settings) -> _Source:
    with open_source(settings.source) as source:
        count = sum(math.prod(spec.shape) for spec in source.specs.values())
        found = fingerprint(source)
    return _Source(found, _files(settings.source), count)


def _files(path: Path | str) -> str:
    """Names, sizes and times of change as one text that can be compared; "" for a remote one."""
    if not isinstance(path, Path):
        return ""
    return hashlib.sha256("\n".join(stamps(path)).encode()).hexdigest()


def _identity(settings: Settings, item: Item, source: _Source) -> dict[str, str]:
    """Everything that an output's bytes depend on, by the name that a message calls it."""
    told = {
        "diffquant's version": __version__,
        "source": source.fingerprint,
        "source files": source.files,
        "type": item.type,
        "target": item.target,
        "container": item.container,
        "verify": "tensors" if settings.verify == "image" else settings.verify,
    }
    told |= _asked(settings, item, source)
    for one in fields(settings):
        if one.name in _OF_THE_TABLE:
            continue
        value = getattr(settings, one.name)
        if one.name in ("imatrix", "base", "inputs"):
            paths = value if isinstance(value, tuple) else (value,)
            told[one.name] = " ".join(_files(path) for path in paths if path is not None)
        elif one.name == "lora":
            rows = (f"{x.label} {_files(x.path)}" for x in value)
            told[one.name] = " ".join(rows)
        else:
            told[one.name] = repr(value)
    return told


def _asked(settings: Settings, item: Item, source: _Source) -> dict[str, str]:
    """What a budget or a recipe adds: what a type has none of is not noted."""
    want = item.want
    if want.recipe is not None:
        return {"recipe": _files(want.recipe), "recipe's type": want.type}
    if want.budget is None:
        return {}
    measured = want.sensitivity
    if measured is None:
        found = find_sensitivity(Path(settings.source), source.fingerprint)
        measured = None if isinstance(found, str) else found[0]
    return {
        "budget": want.budget.text,
        "formats to choose from": " ".join(want.budget.among),
        "layers freed": str(want.budget.free_kept),
        "sensitivity": _content(measured) if measured is not None else "",
    }


def _content(path: Path) -> str:
    """The bytes of a file, as one text: it may be found in a cache, where times mean nothing."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picture_identity(settings: Settings) -> str:
    """Tell whether a verdict is of the prompts that are asked for."""
    prompts = settings.prompts.read_bytes() if settings.prompts is not None else b""
    return hashlib.sha256(__version__.encode() + b"\0" + prompts).hexdigest()
