"""Jobs in processes of this machine, as many at once as its memory and its GPUs allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.publish.batch.child import ASKED, Child
from diffquant.publish.batch.job import Job, run
from diffquant.publish.batch.slots import Slots, next_job

__all__ = ["NOT_DONE", "Ended", "run_pool"]

_POLL_S = 1.0  # at most, between two looks: Ctrl-C is heard on every system
NOT_DONE = "not done, as another job failed (--fail-fast)"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended.

    Attributes:
        code: 0, or the exit code of its error.
        message: of its error.
        seconds: from start to end; 0 where it was not started.
    """

    job: Job
    code: int = 0
    message: str = ""
    seconds: float = 0.0


def run_pool(
    jobs: Sequence[Job],
    slots: Slots,
    *,
    fail_fast: bool = False,
    progress: Progress = NO_PROGRESS,
    ended: Callable[[Ended], None] = lambda _: None,
    work: Callable[..., None] = run,
) -> tuple[Ended, ...]:
    """Run every job; one that fails does not stop the others.

    Args:
        jobs: in the order in which they should start.
        slots: what they may take.
        fail_fast: stop the others when one fails, and start no more.
        progress: told about bytes of outputs.
        ended: told of every job that ends, as it ends.
        work: what a child calls; importable by name.

    Raises:
        KeyboardInterrupt: all children have ended, and none left anything half-written.
    """
    waiting, running = list(jobs), list[Child]()
    found: list[Ended] = []
    failed = False
    progress.start("batch", sum(job.nbytes for job in jobs))
    try:
        while waiting or running:
            while not (failed and fail_fast):
                chosen = next_job(waiting, [child.job for child in running], slots)
                if chosen is None:
                    break
                job = waiting.pop(chosen[0])
                running.append(Child(replace(job, gpu=chosen[1]), work))
            if not running:
                break
            wait([one for child in running for one in child.waitables], _POLL_S)
            for child in running:
                progress.advance(child.poll())
            for child in [child for child in running if child.ended]:
                running.remove(child)
                code, message = child.failure or (0, "")
                if code == ASKED:  # by us, or by somebody who knows the child
                    code, message = 1, NOT_DONE if failed and fail_fast else "it was told to end"
                found.append(Ended(child.job, code, message, child.seconds))
                ended(found[-1])
                failed = failed or code != 0
            if failed and fail_fast:
                for child in running:
                    child.stop()
    except BaseException:
        for child in running:
            child.stop()
        for child in running:
            child.gone()
        raise
    finally:
        progress.stop()
    found += [Ended(job, 1, NOT_DONE) for job in waiting]
    return tuple(found)
