"""What a screen can show: its width, colour, bars and trees, with plain twins for plain terminals.

Colour marks what a reader looks for (a verdict, a name), never carries meaning alone, and is left
out on pipes and under NO_COLOR. Block and line characters become ASCII where stdout has no Unicode.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import click

from diffquant.cli.frame import plain_text

__all__ = [
    "Tone",
    "bar",
    "billions",
    "branches",
    "clip",
    "count",
    "styled",
    "unicode",
    "width",
    "wrap",
]

_WIDEST = 140  # longer lines are hard to follow
_EIGHTHS = " ▏▎▍▌▋▊▉█"
Tone = Mapping[str, Any]  # of click.style
TITLE: Tone = {"bold": True}
DIM: Tone = {"dim": True}
GOOD: Tone = {"fg": "green"}
CARE: Tone = {"fg": "yellow"}
BAD: Tone = {"fg": "red"}


def width() -> int:
    """Columns of the terminal: COLUMNS, else what the terminal says, else 80; at most 140."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, _WIDEST))


def unicode() -> bool:
    """Whether stdout can encode block and line characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "█├✓".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def styled(*pieces: str | tuple[str, Tone]) -> None:
    """Print a line of pieces, each plain or with a tone; control characters are shown, not sent."""
    line = ""
    for piece in pieces:
        text, tone = (piece, {}) if isinstance(piece, str) else piece
        line += click.style(plain_text(text), **tone) if tone else plain_text(text)
    click.echo(line.rstrip(), color=False if os.environ.get("NO_COLOR") else None)


def bar(share: float, columns: int) -> str:
    """A bar of `columns` cells, filled to `share` of them in steps of an eighth."""
    share = min(max(share, 0.0), 1.0)
    if not unicode():
        return ("#" * round(share * columns)).ljust(columns)
    eighths = round(share * columns * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(columns)


def branches(number: int) -> list[str]:
    """What stands before each of `number` leaves of a tree."""
    middle, last = ("├─", "└─") if unicode() else ("|-", "`-")
    return [middle] * (number - 1) + [last] * min(number, 1)


def clip(text: str, columns: int) -> str:
    """Cut the middle out of a text that is too long: both ends of a file name tell something."""
    if len(text) <= columns:
        return text
    dots = "…" if unicode() else "..."
    kept = max(columns - len(dots), 2)
    return text[: kept - kept // 2] + dots + text[len(text) - kept // 2 :]


def wrap(text: str, indent: str = "  ") -> list[str]:
    """Lines of at most the screen's width, each indented; words are not cut."""
    return textwrap.wrap(
        text,
        width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def billions(number: int) -> str:
    """A count of weights as people read it: 11.90 B, 83.7 M, 512."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return str(number)


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 file", "3 files"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
