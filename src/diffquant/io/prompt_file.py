"""Prompts in a text file, one per line."""

from __future__ import annotations

from pathlib import Path

from diffquant.core.errors import UsageError

__all__ = ["read_prompts"]


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line; empty lines and lines that start with # are skipped.

    Raises:
        UsageError: no prompt in it, or no UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"{path}: no prompts in it, expected one per line")
    return prompts
