"""Jobs as tasks of Ray: its scheduler places them, on this machine or on a cluster.

Every node needs diffquant, and the plan's paths: sources and the output folder lie on a disk that
all of them share. What a task takes is stated (num_cpus, num_gpus, memory), and it is not retried:
what failed is said, and run again with the batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from diffquant.core.errors import ResourceError, UsageError
from diffquant.core.failures import explain
from diffquant.publish.batch.job import Job, run
from diffquant.publish.batch.pool import NOT_DONE, Ended
from diffquant.publish.batch.record import locked, record_path

__all__ = ["LOCAL", "check_ray", "run_ray"]

LOCAL = "local"
_POLL_S = 1.0
_STOP_S = 20.0
_KNOCK_S = 5.0


def check_ray() -> None:
    """Check that Ray can be imported, before anything is planned.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray, which is not installed: pip install 'diffquant[ray]'")


def run_ray(
    jobs: Sequence[Job],
    address: str,
    *,
    cores: int,
    gpus: int = 0,
    fail_fast: bool = False,
    ended: Callable[[Ended], None] = lambda _: None,
) -> tuple[Ended, ...]:
    """Run every job as a task; one that fails does not stop the others.

    Args:
        jobs: with the threads that each may take.
        address: of a cluster, "auto", or LOCAL for one that lives as long as this call.
        cores: of a local one.
        gpus: GPUs of a local one; a cluster's nodes tell theirs.
        fail_fast: cancel the others when one fails.
        ended: told of every job that ends.

    Raises:
        UsageError: no cluster answers at the address, or it refuses us.
        ResourceError: no node can hold one of the jobs, which would wait for ever.
        KeyboardInterrupt: tasks were cancelled.
    """
    import ray

    check_ray()
    started = _connect(ray, address, cores, gpus)
    try:
        _check_nodes(ray, jobs)
        total_gpus = ray.cluster_resources().get("GPU", 0)
        refs = {_submit(ray, job, gpu=total_gpus >= 1): job for job in jobs}
        return tuple(_collect(ray, refs, fail_fast=fail_fast, ended=ended))
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str, cores: int, gpus: int) -> bool:  # noqa: ANN401 - a module
    """Connect, unless this process is connected already; whether it was done here."""
    if ray.is_initialized():
        return False
    _check_answers(address)
    given: dict[str, Any] = {"address": address}
    if address == LOCAL:
        given |= {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", **given)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"--ray {address}: cannot connect to a cluster: {error}") from error
    return True


def _check_answers(address: str) -> None:
    """Knock first: Ray itself waits for minutes where nobody answers.

    Raises:
        UsageError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: no cluster answers ({error}); start one with `ray start --head`, or "
            f"use `--ray {LOCAL}`"
        ) from None


def _check_nodes(ray: Any, jobs: Sequence[Job]) -> None:  # noqa: ANN401
    nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    for job in jobs:
        fits = any(
            job.threads <= one.get("CPU", 0) and job.peak_nbytes <= one.get("memory", 0)
            for one in nodes
        )
        if not fits:
            raise ResourceError(
                f"{job.label}: needs {job.threads} processors and {job.peak_nbytes >> 20} MiB, and "
                "no node of the cluster has both: use fewer --threads, or more --jobs"
            )


def _submit(ray: Any, job: Job, *, gpu: bool) -> Any:  # noqa: ANN401 - Ray's references
    wants = 1 if gpu and job.pictures else 0
    if wants:
        job = replace(job, gpu="ray")  # it sets CUDA_VISIBLE_DEVICES itself
    task = ray.remote(_task)
    options = {"num_cpus": job.threads, "num_gpus": wants, "memory": job.peak_nbytes}
    return task.options(max_retries=0, name=job.label, **options).remote(job)


def _task(job: Job) -> tuple[int, str, float]:
    """What runs on a node: exit code, message, seconds."""
    began = time.monotonic()
    try:
        run(job)
    except Exception as error:
        return (*explain(error), time.monotonic() - began)
    return 0, "", time.monotonic() - began


def _collect(
    ray: Any,  # noqa: ANN401
    refs: dict[Any, Job],
    *,
    fail_fast: bool,
    ended: Callable[[Ended], None],
) -> list[Ended]:
    found: list[Ended] = []
    waiting = dict(refs)
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
            for ref in ready:
                job = waiting.pop(ref)
                found.append(Ended(job, *_answer(ray, ref)))
                ended(found[-1])
            if fail_fast and any(one.code for one in found):
                break
    finally:
        for ref in waiting:
            ray.cancel(ref)  # KeyboardInterrupt in a running task, which cleans up
        _await_locks(waiting.values())
    return found + [Ended(job, 1, NOT_DONE) for job in waiting.values()]


def _await_locks(jobs: Iterable[Job]) -> None:
    """Wait until cancelled tasks are through with their outputs: Ray does not tell."""
    until = time.monotonic() + _STOP_S
    for job in jobs:
        for item in (*job.write, *job.judge):
            lock = record_path(job.folder, item.name).with_suffix(".lock")
            left = max(until - time.monotonic(), 0.0)
            with contextlib.suppress(UsageError), locked(lock, item.name, wait_s=left):
                pass


def _answer(ray: Any, ref: Any) -> tuple[int, str, float]:  # noqa: ANN401
    try:
        code, message, seconds = ray.get(ref)
    except ray.exceptions.RayError as error:  # the worker or its node is gone
        return 1, f"Ray lost it: {str(error).strip().splitlines()[0]}", 0.0
    return code, message, seconds
