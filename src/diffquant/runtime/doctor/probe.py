"""A look at something that may be broken: what was found, or a record of why nothing was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Broken", "probe"]

_LONGEST = 300  # of a library's own words; loaders print whole search paths
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Broken:
    """Something that failed when it was looked at.

    Attributes:
        what: the library or the place.
        error: the kind of error and its first line.
    """

    what: str
    error: str


def probe(what: str, look: Callable[[], Found], broken: list[Broken]) -> Found | None:
    """Look; None, and a row in `broken`, where that fails."""
    try:
        return look()
    # A half-installed library may raise anything while it loads. Nothing is hidden: the row is
    # shown as a problem.
    except Exception as error:
        told = (str(error).strip().splitlines() or [""])[0][:_LONGEST]
        broken.append(Broken(what, f"{type(error).__name__}: {told}" if told else repr(error)))
        return None
