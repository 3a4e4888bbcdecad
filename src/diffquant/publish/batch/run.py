"""run_batch(): a plan file carried out, or what is left of it.

read -> lock the output folder -> plan every model and look at the journal -> check disk and memory
-> jobs in processes, or as tasks of Ray -> read the journal again -> report.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from diffquant.convert.workers import default_workers
from diffquant.core.errors import ResourceError, UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.publish.batch.job import Job
from diffquant.publish.batch.plan_file import read_plan_file
from diffquant.publish.batch.planning import BatchPlan, make_batch_plan
from diffquant.publish.batch.pool import Ended, run_pool
from diffquant.publish.batch.ray_pool import check_ray, run_ray
from diffquant.publish.batch.record import FOLDER, locked
from diffquant.publish.batch.report import BatchReport, batch_report
from diffquant.publish.batch.slots import Slots, default_processes, visible_gpus

__all__ = ["run_batch"]

_SHARE = 0.9  # of the memory that is free when the batch begins


def run_batch(
    path: Path,
    *,
    processes: int | None = None,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    fail_fast: bool = False,
    ray: str | None = None,
    progress: Progress = NO_PROGRESS,
    ended: Callable[[Ended], None] = lambda _: None,
) -> BatchReport:
    """Plan, and unless `dry_run` make, every output of a plan file that is not done.

    Args:
        path: the plan file.
        processes: jobs at once; by default one for each four cores.
        threads: of all of them together; by default every core.
        memory_nbytes: for all of them together; by default 90 % of what is free.
        dry_run: plan only; nothing is written, the journal neither.
        force: make everything again.
        fail_fast: stop at the first job that fails.
        ray: address of a Ray cluster, or "local".
        progress: told about bytes of outputs.
        ended: told of every job that ends.

    Raises:
        MalformedFile, UsageError: the plan file, or another batch is at work in its folder.
        DiffquantError: a model cannot be planned; nothing was written.
        ResourceError: not enough disk, or memory for one job.
        KeyboardInterrupt: what is finished is noted; the same again goes on.
    """
    if ray is not None:
        check_ray()
    file = read_plan_file(path)
    cores = threads or default_workers()
    count = processes or default_processes(len(file.models), cores)
    each = max(1, cores // count)
    with _held(file.output, dry_run=dry_run):
        plan = make_batch_plan(file, threads=each, force=force)
        if ray is None and plan.jobs:
            count = min(count, len(plan.jobs))
            plan = replace(plan, jobs=tuple(_widened(one, cores // count) for one in plan.jobs))
        gpus = _gpus(plan)
        memory = memory_nbytes or _free_memory()
        if ray is None:
            _check_memory(plan, memory)
        notes = _notes(plan, gpus, ray)
        found: tuple[Ended, ...] = ()
        if not dry_run and plan.jobs:
            try:
                if ray is not None:
                    found = run_ray(
                        plan.jobs,
                        ray,
                        cores=cores,
                        gpus=len(gpus),
                        fail_fast=fail_fast,
                        ended=ended,
                    )
                else:
                    found = run_pool(
                        plan.jobs,
                        Slots(count, memory, gpus),
                        fail_fast=fail_fast,
                        progress=progress,
                        ended=ended,
                    )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    "interrupted; what is finished is noted, the same command goes on from there"
                ) from None
        return batch_report(
            plan,
            found,
            dry_run=dry_run,
            processes=count,
            threads=cores,
            memory_nbytes=memory,
            gpus=gpus,
            where=f"ray {ray}" if ray is not None else "processes",
            notes=notes,
        )


@contextlib.contextmanager
def _held(folder: Path, *, dry_run: bool) -> Iterator[None]:
    """Make the output folder, and keep other batches out of it; a dry run touches nothing."""
    if not folder.parent.is_dir():
        raise UsageError(f"{folder}: folder {folder.parent} does not exist, create it first")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: `output` is not a folder; name another")
    if dry_run:
        yield
        return
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    lock = folder / FOLDER / "lock"
    try:
        with locked(lock, str(folder)):
            yield
    finally:
        # a batch that could not be planned leaves nothing
        if made and [one.name for one in folder.rglob("*")] in (["lock"], [FOLDER, "lock"]):
            lock.unlink()
            lock.parent.rmdir()
            folder.rmdir()


def _widened(job: Job, threads: int) -> Job:
    """The job with more threads, where fewer jobs are left than processes; memory grows with it."""
    if threads <= job.threads:
        return job
    peak = -(-job.peak_nbytes * threads // job.threads)
    return replace(job, threads=threads, peak_nbytes=peak)


def _gpus(plan: BatchPlan) -> tuple[str, ...]:
    """GPUs of this machine; nobody is asked where no job has pictures to compare."""
    if not any(job.pictures for job in plan.jobs):
        return ()
    from diffquant.runtime.devices import available_devices

    count = sum(":" in name for name in available_devices())
    return visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), count)


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available * _SHARE)


def _check_memory(plan: BatchPlan, memory: int) -> None:
    large = [job for job in plan.jobs if job.peak_nbytes > memory]
    if large:
        job = max(large, key=lambda one: one.peak_nbytes)
        raise ResourceError(
            f"{job.label}: needs about {job.peak_nbytes >> 20} MiB with {job.threads} threads, the "
            f"batch has {memory >> 20} MiB: use fewer --threads, or --memory where you know better"
        )


def _notes(plan: BatchPlan, gpus: tuple[str, ...], ray: str | None) -> tuple[str, ...]:
    if ray is None and not gpus and any(job.pictures for job in plan.jobs):
        return ("pictures are compared on the processor: CUDA shows no GPU here",)
    return ()
