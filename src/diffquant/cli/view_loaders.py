"""Rendering of loader verdicts: a line per program on a file's page, one in full for `--for`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from diffquant.cli.frame import echo
from diffquant.cli.screen import BAD, CARE, DIM, GOOD, styled, width
from diffquant.inspect.loaders import LoaderVerdict

__all__ = ["render_loaders", "render_verdict"]

_WORDS = {"accepts": "yes", "caveat": "yes, if", "unknown": "unknown", "refuses": "no"}
_TONES = {"accepts": GOOD, "caveat": CARE, "unknown": DIM, "refuses": BAD}
_NOTHING = "nothing is known of such a file"


def render_loaders(verdicts: Sequence[LoaderVerdict]) -> None:
    """Print who loads a file: the program, its verdict, and the reason that decided."""
    echo()
    echo("  who can load it (--for NAME says more)")
    name = max(len(one.loader) for one in verdicts)
    word = max(map(len, _WORDS.values()))
    indent = 4 + name + 2 + word + 2
    for one in verdicts:
        told = _told(one)
        rows = _lines(told, indent, lines=2)
        head = f"    {one.loader:<{name}}  "
        styled(head, (f"{_WORDS[one.verdict]:<{word}}", _TONES[one.verdict]), f"  {rows[0]}")
        for row in rows[1:]:
            echo(" " * indent + row)


def _told(one: LoaderVerdict) -> str:
    """The reason that decided, and how many others weigh as much."""
    if not one.reasons:
        return _NOTHING
    alike = sum(reason.verdict == one.reasons[0].verdict for reason in one.reasons)
    more = f" (and {alike - 1} more)" if alike > 1 and one.verdict != "accepts" else ""
    return one.reasons[0].text + more


def render_verdict(result: dict[str, Any]) -> None:
    """Print one program's verdict on every file, with all reasons and where they are written."""
    for index, (path, one) in enumerate(result["files"].items()):
        if index:
            echo()
        echo(path)
        rest = "" if one.reasons else f", {_NOTHING}"
        styled(f"  {one.loader}: ", (_WORDS[one.verdict], _TONES[one.verdict]), rest)
        for reason in one.reasons:
            rows = _lines(reason.text, 11)
            styled("  ", (f"{reason.verdict:<8} ", _TONES[reason.verdict]), rows[0])
            for row in rows[1:]:
                echo(" " * 11 + row)
            for row in _lines(f"[{reason.rule}; {reason.source}]", 11):
                styled((" " * 11 + row, DIM))


def _lines(text: str, indent: int, *, lines: int | None = None) -> list[str]:
    """Cut a text into lines that fit behind `indent`; at most `lines` of them."""
    return textwrap.wrap(
        text,
        max(width() - indent, 20),
        break_on_hyphens=False,
        break_long_words=False,
        max_lines=lines,
        placeholder=" ...",
    )
