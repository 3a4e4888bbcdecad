"""quantize() and convert(): from a path to a committed file, through every room once.

open -> bind -> detect -> plan -> check resources -> sink -> stream -> commit -> re-open. Both
return frozen reports; the command line only renders them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffquant.convert.binding import bind
from diffquant.convert.composed import AddedPart, ComposedSource, composed
from diffquant.convert.engine import peak_nbytes, run_plan
from diffquant.convert.job_report import JobReport, job_report
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.error import write_error_lora
from diffquant.convert.lora.error_plan import check_lora_target, plan_error_lora, planned
from diffquant.convert.match import Match
from diffquant.convert.output import fingerprint
from diffquant.convert.placing import cards_worth, place
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.recognise import recognise, recognise_part
from diffquant.convert.remember import remember
from diffquant.convert.reread import verify_output
from diffquant.convert.resume import Resumed, left_by_another_run, refuse_folder, run_resumable
from diffquant.convert.surroundings import (
    check_memory,
    metadata_of,
    refuse_own_source,
    surroundings,
)
from diffquant.convert.transfer import Transfer, TransferredSource, transferred
from diffquant.convert.workers import default_workers
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSource
from diffquant.io import open_sink, open_source
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.cards import cards_for

__all__ = ["container_for", "opened", "run_job"]


def container_for(output: Path) -> str:
    """The container an output path asks for: by extension, a folder without one.

    Raises:
        UsageError: an extension we do not write.
    """
    known = {".gguf": "gguf", ".safetensors": "safetensors", "": "folder"}
    suffix = output.suffix.lower()
    if output.is_dir() or suffix[1:].isdigit():  # stable-diffusion-v1.5
        return "folder"
    if suffix not in known:
        raise UsageError(
            f"{output}: cannot write {suffix} files; use .gguf, .safetensors, or no extension "
            "for a Diffusers folder"
        )
    return known[suffix]


@contextlib.contextmanager
def opened(
    path: Path,
    *,
    arch: str = "",
    parts: Sequence[AddedPart] = (),
    ema: bool = False,
    alone: bool = False,
    quantized: bool = False,
    transfer: Transfer | None = None,
    exact: bool = True,
) -> Iterator[tuple[TensorSource, LogicalSource, Match]]:
    """Open, bind and recognise a source.

    Args:
        path: the source.
        arch: as `recognise` takes it.
        parts: as `composed` takes them.
        ema: as `composed` takes it.
        alone: whether an autoencoder in a file of its own will do.
        quantized: whether a tiny one will, which alone of them has a precision policy.
        transfer: as `transferred` takes it.
        exact: as `transferred` takes it.
    """
    find = recognise_part if alone else recognise
    if quantized and not alone:
        find = partial(recognise_part, quantized=True)
    with (
        open_source(path) as base,
        composed(base, parts=parts, ema=ema, arch=arch) as whole,
        transferred(whole, transfer, exact=exact) as source,
    ):
        logical = bind(source)
        yield (
            source,
            logical,
            find(logical.specs(), source.metadata, source.configs, arch=arch),
        )


def run_job(
    src: Path,
    out: Path,
    request: Request,
    *,
    base: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    verify: str = "tensors",
    resume: bool = False,
    progress: Progress = NO_PROGRESS,
    matrix: ImportanceMatrix | None = None,
    inputs: InputsFile | None = None,
    error_lora: Path | None = None,
    beside: Sequence[Path] = (),
    device: str = "cpu",
) -> JobReport:
    """Plan, and unless `dry_run` write, one output.

    Args:
        src: any source.
        out: path to write; its container is `request.container`.
        request: what to write.
        base: Diffusers folder that configs and tokenizer files are taken from for a folder output.
        force: replace an existing output.
        dry_run: plan only.
        workers: threads.
        verify: "none", "load" (the output opens again and holds what was planned) or "tensors"
            (also every chunk is decoded before it is written, and its hash compared on re-opening).
        resume: keep what is finished when interrupted, and continue it (convert/resume.py); single
            files only.
        progress: told about bytes.
        matrix: importance matrix, for formats that weigh errors by one.
        inputs: statistics of layer inputs, for rounding by feedback, bias correction and to weigh
            the error LoRA.
        error_lora: file to write a LoRA of the quantization error to; of `request.lora_rank`.
        beside: further files that are read meanwhile, and must not be written to.
        device: what encodes, as quant/cards.py's `cards_for` takes it; the bytes are the same.

    Raises:
        DiffquantError: see core/errors.py; nothing is left behind unless `resume`.
    """
    if out.exists():
        refuse_own_source(src, out, base)
    if out.exists() and not force and not dry_run:
        raise UsageError(f"{out} exists; use --force to replace it")
    if resume and request.container == "folder":
        refuse_folder(out)
    if resume and request.shard_nbytes:
        raise UsageError("--resume writes single files: leave out --max-shard-size")
    read = [*(one.path for one in request.added), *beside]
    if request.transfer is not None:
        read += [request.transfer.tuned, request.transfer.base]
    for path in read:
        refuse_own_source(path, out, None)
    if error_lora is not None:
        check_lora_target(error_lora, (src, out, base), force=force or dry_run)
    count = workers or default_workers()
    check = verify == "tensors"
    sources = opened(
        src,
        arch=request.arch,
        parts=request.added,
        ema=request.use_ema,
        alone=request.type is None,
        quantized=True,
        transfer=request.transfer,
        exact=request.type is not None or request.dtype is not None,
    )
    with sources as (source, logical, match):
        plan = make_plan(logical, match, request, matrix=matrix, inputs=inputs)
        if isinstance(source, ComposedSource | TransferredSource):
            plan = replace(plan, notes=(*source.notes, *plan.notes))
        lora = None
        if error_lora is not None:
            lora = plan_error_lora(plan, match, error_lora, matrix=matrix, inputs=inputs)
            plan = replace(plan, notes=(*plan.notes, lora.note))
        cards = cards_worth(device, [plan], cards_for)
        (plan,) = place([plan], cards)
        around = surroundings(plan, match, source, base)
        plan = replace(plan, notes=(*plan.notes, *around.notes))
        memory = peak_nbytes(plan, count, beside=lora.peak_nbytes if lora else 0)
        done = Resumed((), 0, ())
        if not dry_run:
            check_memory(memory)
            metadata = metadata_of(plan, match, source, around.header)
            common: Any = {
                "workers": count,
                "progress": progress,
                "check": check,
                "importance": plan.importance,
                "cards": cards,
            }
            if resume:
                done = run_resumable(logical, plan, out, metadata, force=force, **common)
            else:
                with (
                    _told_of_resume(request),
                    open_sink(
                        out,
                        plan.specs,
                        metadata,
                        force=force,
                        configs=around.configs,
                        files=around.files,
                        shard_nbytes=request.shard_nbytes,
                    ) as sink,
                ):
                    results = run_plan(logical, plan, sink, hashes=check, **common)
                    sink.commit()
                    out = sink.path
                done = Resumed(results, 0, left_by_another_run(out))
            remember(fingerprint(source), src)
    if done.results and verify != "none":
        verify_output(out, plan, done.results, hashes=check, workers=count, progress=progress)
    made = planned(lora) if lora is not None else None
    if lora is not None and not dry_run:
        made = write_error_lora(
            src, out, plan, lora, force=force, workers=count, inputs=inputs, progress=progress
        )
    report = job_report(
        src, out, plan, done, around.missing, around.warnings, memory, count, verify, dry_run
    )
    return replace(report, error_lora=made)


@contextlib.contextmanager
def _told_of_resume(request: Request) -> Iterator[None]:
    """Nothing is kept without --resume; whoever interrupts may want to know that it could be."""
    try:
        yield
    except KeyboardInterrupt:
        if request.container == "folder":
            raise
        raise KeyboardInterrupt(
            "interrupted; nothing was left behind (with --resume, a run can be continued)"
        ) from None
