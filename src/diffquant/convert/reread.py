"""Read an output again and compare the hashes of its chunks with those taken while writing.

Used on the finished output, and on what an interrupted process left before it is continued.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffquant.convert.cutting import chunk_extents
from diffquant.convert.engine import StepResult
from diffquant.convert.gather import raw_range
from diffquant.convert.plan import Plan
from diffquant.convert.workers import Task, run_tasks
from diffquant.core.errors import VerificationError
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source

__all__ = ["altered_tensors", "verify_output"]


def verify_output(
    out: Path,
    plan: Plan,
    results: tuple[StepResult, ...],
    *,
    hashes: bool,
    workers: int = 1,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Open the output as a stranger would, and compare what is there with what was planned.

    Raises:
        VerificationError: other tensors, or with `hashes` other bytes.
    """
    with open_source(out) as source:
        found = {key: (spec.dtype, spec.shape) for key, spec in source.specs.items()}
        planned = {spec.key: (spec.dtype, spec.shape) for spec in plan.specs}
        if found != planned:
            odd = sorted(set(found.items()) ^ set(planned.items()), key=str)[:3]
            raise VerificationError(f"{out}: re-opened, it does not hold what was planned: {odd}")
        if not hashes:
            return
        progress.start("re-read", plan.nbytes)
        try:
            altered = altered_tensors(source, plan, dict(enumerate(results)), workers, progress)
        finally:
            progress.stop()
    if altered:
        key = next(spec.key for spec in plan.specs if spec.key in altered)
        raise VerificationError(f"{out}: {key} reads back other bytes than were written")


def altered_tensors(
    source: TensorSource,
    plan: Plan,
    results: Mapping[int, StepResult],
    workers: int,
    progress: Progress = NO_PROGRESS,
) -> set[str]:
    """Output tensors of these steps whose bytes are not those that were hashed."""
    altered: set[str] = set()
    lock = threading.Lock()

    def compare(key: str, start: int, stop: int, digest: str) -> list[Task]:
        data = raw_range(source, key, start, stop)
        same = hashlib.sha256(data.data).hexdigest() == digest
        progress.advance(stop - start, key)
        if not same:
            with lock:
                altered.add(key)
        return []

    def tasks() -> Iterator[Task]:
        for index, result in results.items():
            for key, digests in result.digests.items():
                extents = chunk_extents(plan.steps[index], key)
                for digest, (start, stop) in zip(digests, extents, strict=True):
                    yield functools.partial(compare, key, start, stop, digest)

    with keep_freed_pages():
        run_tasks(tasks(), workers)
    return altered
