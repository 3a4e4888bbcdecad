"""What an exception means to a user: an exit code and one sentence."""

from __future__ import annotations

import errno

from diffquant.core.errors import DiffquantError

__all__ = ["explain"]


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code a command ends with for an error, and what it says."""
    if isinstance(error, DiffquantError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted; nothing was left behind"
    if isinstance(error, MemoryError):
        return 6, "out of memory; use fewer --threads"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded here
        return (
            6,
            "out of memory on the GPU; use --device cpu, or draw with a smaller --size",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 6, f"no space left on the disk of {error.filename or 'the output'}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("diffquant"):
        return 1, (
            f"the Python package {error.name} is not installed here, or not whole: "
            "pip install --upgrade diffquant brings what it needs; `diffquant doctor` says what is"
        )
    return 1, (
        f"internal error: {type(error).__name__}: {error} "
        "(run again with -v -v for the traceback, and report it)"
    )
