"""One job in a process of its own: how it is started, told about, stopped, and never left alone.

A process per job: a job that is killed (out of memory, a crash in a library) takes no other along,
and its memory is given back when it ends. The child ends by itself when its parent is gone: kill -9
of a batch leaves nothing at work.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from diffquant.core.failures import explain
from diffquant.core.interrupts import keep_interrupts
from diffquant.publish.batch.job import Job, run

__all__ = ["ASKED", "Child"]

_STOP_S = 20.0  # from being asked to end to being killed: a chunk is finished, files are removed
_TELL_S = 0.2  # between two messages about progress
_LOST = 1
ASKED = 130  # it ended because it was told to
_KILLED = -9


class Child:
    """A job at work; `poll` its messages until it has a `failure` or is `done`.

    Attributes:
        job: what it does.
        failure: exit code and message, once it failed.
        done: whether it made everything.
        started_s, seconds: when it began, and how long it took.
    """

    def __init__(self, job: Job, work: Callable[..., None] = run) -> None:
        """Start the process; Ctrl-C in a terminal reaches the parent only, which then stops it."""
        self.job = job
        self.failure: tuple[int, str] | None = None
        self.done = False
        self._asked = False
        self.started_s, self.seconds = time.monotonic(), 0.0
        context = multiprocessing.get_context("spawn")
        self.messages, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_main, args=(job, theirs, work), name=f"diffquant {job.label}", daemon=False
        )
        masked = _block_interrupt()
        try:
            self._process.start()
        finally:
            _restore(masked)
        theirs.close()

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.done or self.failure is not None

    @property
    def waitables(self) -> tuple[Any, ...]:
        """What `multiprocessing.connection.wait` takes."""
        return self.messages, self._process.sentinel

    def poll(self) -> int:
        """Take what it has told; returns bytes of progress."""
        advanced = 0
        try:
            while not self.ended and self.messages.poll():
                kind, *rest = self.messages.recv()
                if kind == "bytes":
                    advanced += rest[0]
                elif kind == "done":
                    self.done = True
                else:
                    self.failure = rest[0], rest[1]
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            # Told to end while it was starting, before it could answer: it has written nothing.
            # A process that is killed (-9) is another matter.
            early = self._asked and code != _KILLED
            self.failure = (ASKED, "") if early else (_LOST, _how_it_ended(code))
        if self.ended:
            self._close()
        return advanced

    def stop(self) -> None:
        """Ask it to end and to remove what is half-written."""
        self._asked = True
        if self._process.is_alive():
            self._process.terminate()

    def gone(self, within_s: float = _STOP_S) -> None:
        """Wait until it has ended, and kill it when that takes too long."""
        self._process.join(within_s)
        if self._process.is_alive():
            self._process.kill()
        self._close()

    def _close(self) -> None:
        self._process.join()
        self.seconds = time.monotonic() - self.started_s
        self.messages.close()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        killed = code == _KILLED
        hint = ": out of memory? use fewer processes (--jobs) or --memory" if killed else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code} and no word"


def _block_interrupt() -> set[int] | None:
    """A child inherits what is blocked: none hears Ctrl-C before it can answer it."""
    if not hasattr(signal, "pthread_sigmask"):
        return None
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}))


def _restore(masked: set[int] | None) -> None:
    if masked is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _main(job: Job, messages: Connection, work: Callable[..., None]) -> None:
    """What runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _interrupt)
    keep_interrupts(_interrupt_again)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = job.gpu
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    progress = _Teller(messages)
    try:
        work(job, progress)
    except BaseException as error:  # told to the parent, which goes on with the others
        _tell(messages, ("failed", *explain(error)))
        return
    progress.flush()
    _tell(messages, ("done",))


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is cleaning up
    raise KeyboardInterrupt


def _interrupt_again() -> None:
    """From another thread, where no handler can be set: the exception itself is what is left."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.main_thread().ident or 0), ctypes.py_object(KeyboardInterrupt)
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by Child"
    wait([parent.sentinel])
    _thread.interrupt_main(signal.SIGTERM)
    time.sleep(_STOP_S)
    os._exit(_LOST)


def _tell(messages: Connection, message: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError):  # the parent is gone, and nobody listens
        messages.send(message)


class _Teller:
    """Progress of a child: bytes are sent a few times a second."""

    def __init__(self, messages: Connection) -> None:
        self._messages, self._lock = messages, threading.Lock()
        self._waiting, self._last_s = 0, time.monotonic()
        self._counts = False

    def start(self, label: str, total: int, unit: str = "B") -> None:
        """Bytes count towards the batch; steps of pictures do not."""
        self._counts = unit == "B"

    def advance(self, amount: int, key: str = "") -> None:
        """Send what has come together since the last message, when it is time."""
        if not self._counts:
            return
        with self._lock:
            self._waiting += amount
            if time.monotonic() - self._last_s >= _TELL_S:
                self._send()

    def flush(self) -> None:
        """Send what is left."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        _tell(self._messages, ("bytes", self._waiting))
        self._waiting, self._last_s = 0, time.monotonic()

    def stop(self) -> None:
        """The phase has ended; nothing to do."""
