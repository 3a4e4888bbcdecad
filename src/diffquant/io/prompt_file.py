"""Small text files that list things, one per line: prompts, seeds."""

from __future__ import annotations

from pathlib import Path

from diffquant.core.errors import UsageError

__all__ = ["read_lines", "read_prompts"]

_LARGEST_NBYTES = 1 << 20


def read_lines(path: Path) -> tuple[str, ...]:
    """Read the lines of a file; empty ones and those that start with # are skipped.

    Raises:
        UsageError: no UTF-8, or too large for a list.
    """
    with path.open("rb") as file:
        raw = file.read(_LARGEST_NBYTES + 1)
    if len(raw) > _LARGEST_NBYTES:
        raise UsageError(f"{path}: over {_LARGEST_NBYTES} bytes, no list of prompts or seeds")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line, as `read_lines` does.

    Raises:
        UsageError: no prompt in it, or no list at all.
    """
    prompts = read_lines(path)
    if not prompts:
        raise UsageError(f"{path}: no prompts in it, expected one per line")
    return prompts
