"""An interrupt that strikes inside a finalizer is not lost."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable

__all__ = ["ctrl_c", "keep_interrupts"]

_AGAIN_S = 0.02  # by then the finalizer is over; another one may be running, which is no harm


def keep_interrupts(again: Callable[[], object]) -> None:
    """Have `again` called from another thread whenever a KeyboardInterrupt was swallowed.

    Python throws away what is raised in a weak reference's callback, in `__del__` or in a callback
    from C. Buffers that go back to a pool on being dropped make such moments a few in a hundred: of
    26 pictures that were interrupted, 2 went on being drawn (docs/lab-log.md, 2026-11-27).

    Args:
        again: raises a KeyboardInterrupt in the main thread, as `ctrl_c` does.
    """
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            # No threading.Thread: it takes locks that the code under the finalizer may hold.
            _thread.start_new_thread(_soon, (again,))
        else:
            before(lost)

    sys.unraisablehook = hook


def ctrl_c() -> None:
    """Interrupt the main thread as Ctrl-C does, also where it waits in the kernel."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def _soon(again: Callable[[], object]) -> None:
    time.sleep(_AGAIN_S)
    again()
