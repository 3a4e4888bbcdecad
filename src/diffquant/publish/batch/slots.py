"""Which job starts next: by processes, memory and GPUs that are free. No clock, no process: pure.

A job that is to compare pictures gets a GPU to itself where the machine has any. Jobs start in the
order of the plan; one that does not fit now is passed by others that do, and starts at the latest
when it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffquant.publish.batch.job import Job

__all__ = ["Slots", "default_processes", "next_job", "visible_gpus"]

_CORES_EACH = 4  # a pass uses few more well: it reads, computes and writes


@dataclass(frozen=True, slots=True)
class Slots:
    """What a machine gives to a batch.

    Attributes:
        processes: how many at once.
        memory_nbytes: for all of them together.
        gpus: as CUDA_VISIBLE_DEVICES names them.
    """

    processes: int
    memory_nbytes: int
    gpus: tuple[str, ...] = ()


def next_job(
    waiting: Sequence[Job], running: Sequence[Job], slots: Slots
) -> tuple[int, str] | None:
    """Index of the job to start now and its GPU ("" for none); None to wait for one to end."""
    if len(running) >= slots.processes:
        return None
    taken = {job.gpu for job in running}
    free = [gpu for gpu in slots.gpus if gpu not in taken]
    left = slots.memory_nbytes - sum(job.peak_nbytes for job in running)
    for index, job in enumerate(waiting):
        if running and job.peak_nbytes > left:
            continue
        if job.pictures and slots.gpus:
            if free:
                return index, free[0]
            continue
        return index, ""
    return None


def default_processes(jobs: int, cores: int) -> int:
    """Processes at once: one for each four cores, no more than there are jobs, and at least one."""
    return max(1, min(jobs, cores // _CORES_EACH))


def visible_gpus(stated: str | None, count: int) -> tuple[str, ...]:
    """GPUs that a batch may use.

    Args:
        stated: CUDA_VISIBLE_DEVICES, None where it is not set; identifiers may be UUIDs.
        count: how many CUDA sees under it.
    """
    if stated is None:
        return tuple(str(index) for index in range(count))
    return tuple(one.strip() for one in stated.split(",") if one.strip())[:count]
