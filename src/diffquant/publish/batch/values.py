"""Values of a plan file: each reader checks one kind, and says what it expected.

A reader takes a TOML value and the plan's folder, which paths are relative to, and raises
ValueError with the words that follow "expected".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffquant.core.errors import DiffquantError, UnknownFormat, closest

__all__ = [
    "Read", "UnknownNameError", "choice", "file_path", "flag", "is_name", "known", "many",
    "plain_name", "text",
]  # fmt: skip

# What Windows cannot have in a name; a plan is to mean the same everywhere.
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\<>:\"|?*]{1,120}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_MAX_TEXT = 4096

Read = Callable[[Any, Path], Any]


class UnknownNameError(ValueError):
    """A type, format or program that no table has: exit code 4, as in `quantize`."""


def text(value: Any, _: Path) -> str:  # noqa: ANN401 - any TOML value
    """A text."""
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT or "\0" in value:
        raise ValueError(f"a text of 1 to {_MAX_TEXT} characters")
    return value


def flag(value: Any, _: Path) -> bool:  # noqa: ANN401
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def file_path(value: Any, folder: Path) -> Path:  # noqa: ANN401
    """A file or folder that is there."""
    path = folder / text(value, folder)
    if not path.exists():
        raise ValueError(f"a file that exists; there is no {path}")
    return path


def is_name(value: str) -> bool:
    """Whether a file can be called so on every system."""
    odd = value[:1] == "." or value[-1:] in (".", " ") or _DEVICES.fullmatch(value)
    return _NAME.fullmatch(value) is not None and not odd


def plain_name(value: Any, folder: Path) -> str:  # noqa: ANN401
    """A file's name without its extension."""
    found = text(value, folder)
    if not is_name(found):
        raise ValueError("a file name without its extension, and no folder in it")
    return found


def choice(names: tuple[str, ...], error: type[ValueError] = ValueError) -> Read:
    """One of these texts; another text is `error`."""

    def read(value: Any, folder: Path) -> str:  # noqa: ANN401
        if not isinstance(value, str):
            raise ValueError(f"one of {', '.join(names)}")
        if value not in names:
            near = closest(value, names)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise error(f"one of {', '.join(names)}{hint}")
        return value

    return read


def many(read: Read) -> Read:
    """One value, or a list of them without doubles."""

    def each(value: Any, folder: Path) -> tuple[Any, ...]:  # noqa: ANN401
        values = value if isinstance(value, list) else [value]
        found = tuple(read(one, folder) for one in values)
        if not found:
            raise ValueError("at least one value")
        if len(set(found)) < len(found):
            twice = next(one for one in found if found.count(one) > 1)
            raise ValueError(f"each value once; {twice} comes twice")
        return found

    return each


def known(read: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `read` returns
    """What `read` returns, its refusal in a reader's words."""
    try:
        return read()
    except UnknownFormat as error:
        raise UnknownNameError(f"something known: {error}") from None
    except DiffquantError as error:
        raise ValueError(f"something known: {error}") from None
