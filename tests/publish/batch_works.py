"""What child processes of tests run; a module of its own, because a spawned process imports it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from diffquant.core.errors import VerificationError
from diffquant.publish.batch import job as job_module
from diffquant.publish.batch import run as run_module
from diffquant.publish.batch.pool import Ended


def note(job, progress):
    """Leave a file that tells what the process was given."""
    text = f"{job.gpu!r} {os.environ['CUDA_VISIBLE_DEVICES']!r} {os.environ['OMP_NUM_THREADS']}"
    (job.folder / job.label).write_text(text)
    progress.start("x", 8)
    progress.advance(5)
    progress.advance(3)


def fail(job, progress):
    """End with an error of the tree."""
    raise VerificationError("a gate failed")


def crash(job, progress):
    """End as the system ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def by_label(job, progress):
    """Do what the label says."""
    globals()[job.label.partition("-")[0]](job, progress)


def wait(job, progress):
    """Work until told to end, and say that something was cleaned up."""
    (job.folder / f"{job.label}.{os.getpid()}.at-work").touch()
    try:
        while True:
            time.sleep(0.02)
    finally:
        (job.folder / f"{job.label}.{os.getpid()}.cleaned").touch()


def inline(jobs, slots=None, *, fail_fast=False, ended=lambda _: None, **_):
    """Stands for run_pool: the same jobs, one after the other, in this process."""
    found = []
    for job in jobs:
        try:
            job_module.run(job)
        except Exception as error:
            found.append(Ended(job, getattr(error, "exit_code", 1), str(error)))
        else:
            found.append(Ended(job))
        ended(found[-1])
    return tuple(found)


def kill_at(point):
    """Have this process killed at the n-th call of a step: "commit:2" is before the second."""
    name, _, number = point.partition(":")
    owner, attribute = {
        "write": ("diffquant.io.atomic.FlatSink", "write"),
        "commit": ("diffquant.io.atomic.FlatSink", "commit"),
        "record": (job_module, "write_record"),
        "digest": (job_module, "digest_of"),
    }[name]
    if isinstance(owner, str):
        from diffquant.io.atomic import FlatSink

        owner = FlatSink
    plain, left = getattr(owner, attribute), [int(number)]

    def step(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)

    setattr(owner, attribute, step)


if __name__ == "__main__":
    # PLAN POINT: a batch in this one process, killed at a point
    kill_at(sys.argv[2])
    run_module.run_pool = inline
    run_module.run_batch(Path(sys.argv[1]), threads=1)
    print("not killed")
