"""A pool of threads over a stream of tasks; kernels, reads, writes and hashes release the GIL.

Tasks are taken in order, so that a few at a time are in flight and memory stays bounded. A task may
return more tasks, which go first. The first error stops all threads and is raised in the caller's.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["Task", "default_workers", "run_tasks"]

Task = Callable[[], "list[Task]"]
_POLL_S = 0.2


def default_workers() -> int:
    """One worker per processor this process may use."""
    count = getattr(os, "process_cpu_count", None) or os.cpu_count
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return count() or 1


def run_tasks(tasks: Iterable[Task], workers: int) -> None:
    """Run every task, and every task these return.

    Raises:
        BaseException: the first one that a task raised, or the caller's KeyboardInterrupt; no
            thread is left running.
    """
    pool = _Pool(tasks)
    if workers <= 1:
        pool.work()
    else:
        threads = [threading.Thread(target=pool.work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # a timeout keeps the main thread open to Ctrl-C
                    thread.join(_POLL_S)
        except BaseException as error:
            pool.stop(error)
            for thread in threads:
                thread.join()
            raise
    if pool.failure:
        raise pool.failure[0]


class _Pool:
    def __init__(self, tasks: Iterable[Task]) -> None:
        self.failure: list[BaseException] = []
        self._tasks = iter(tasks)
        self._late: deque[Task] = deque()
        self._condition = threading.Condition()
        self._running = 0

    def work(self) -> None:
        """Run tasks until none is left or one failed."""
        while (task := self._take()) is not None:
            more: list[Task] = []
            try:
                more = task()
            except BaseException as error:  # carried to the caller's thread, raised there
                self.failure.append(error)
            with self._condition:
                self._running -= 1
                self._late.extend(more)
                self._condition.notify_all()

    def stop(self, error: BaseException) -> None:
        """Let running tasks end and start no other."""
        self.failure.append(error)
        with self._condition:
            self._condition.notify_all()

    def _take(self) -> Task | None:
        with self._condition:
            while not self.failure:
                try:
                    task = self._late.popleft() if self._late else next(self._tasks, None)
                except BaseException as error:  # of what makes the tasks: carried like a task's own
                    self.failure.append(error)
                    self._condition.notify_all()
                    return None
                if task is not None:
                    self._running += 1
                    return task
                if not self._running:
                    return None
                self._condition.wait()
            return None
