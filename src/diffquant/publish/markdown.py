"""Text from strangers in Markdown: file names, prompts, header values and reasons.

A card is rendered as HTML on a page that visitors trust. What comes from a file must stay text: no
tag, no link, no picture, no end of a table's cell, no end of a code span. Invisible characters that
turn lines around are shown as their code.

Source: CommonMark 0.31.2, sections 2.4 (every ASCII punctuation character may be escaped) and 6.1;
GitHub Flavored Markdown, section 4.10: a bar ends a cell even in a code span, unless escaped.
"""

from __future__ import annotations

import re

from markupsafe import Markup

__all__ = ["cell_code", "code", "fenced", "prose", "text"]

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_QUIET = frozenset(",.;:()/%+'\"? -=")  # punctuation that starts nothing inside a line
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LONGEST = 2000


def text(value: object) -> Markup:
    """A line of text: shown as it is, whatever it holds."""
    plain = _line(value)
    out = [
        _ENTITIES.get(char) or (char if char in _QUIET else _PUNCTUATION.sub(r"\\\1", char))
        for char in plain
    ]
    joined = "".join(out)
    # A list or a rule begins at the start of a line only; an address would be linked by itself.
    joined = re.sub(r"^(?:[-+](?=\s|$)|[-=]+$)", lambda one: _entity(one[0]), joined)
    joined = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", joined)
    joined = re.sub(r"(?i)(https?|ftp):(?=//)", lambda one: f"{one[1]}&#58;", joined)
    return Markup(re.sub(r"(?i)\bwww\.", "www&#46;", joined))


def code(value: object) -> Markup:
    """A code span, longer fences around what holds backticks."""
    plain = _line(value)
    run = max((len(one) for one in re.findall(r"`+", plain)), default=0)
    ticks = "`" * (run + 1)
    space = " " if plain[:1] in ("`", " ", "") or plain[-1:] in ("`", " ") else ""
    return Markup(f"{ticks}{space}{plain}{space}{ticks}")


def cell_code(value: object) -> Markup:
    """A code span in a table's cell, where a bar ends the cell unless it is escaped."""
    return Markup(str(code(value)).replace("|", "\\|"))


def prose(value: object) -> Markup:
    """A line of text in which what stands between backticks is code."""
    pieces = str(value).split("`")
    if len(pieces) % 2 == 0:
        return text(value)
    return Markup("").join(
        (code(piece) if index % 2 else text(piece)) for index, piece in enumerate(pieces) if piece
    )


def fenced(value: str, language: str = "") -> Markup:
    """A code block, its fence longer than any inside."""
    run = max((len(one) for one in re.findall(r"`{3,}", value)), default=2)
    fence = "`" * max(run + 1, 3)
    lines = "\n".join(_line(one) for one in value.split("\n"))
    return Markup(f"{fence}{language}\n{lines}\n{fence}")


def _entity(chars: str) -> str:
    return f"&#{ord(chars[0])};{chars[1:]}"


def _line(value: object) -> str:
    """One line, bounded, without control characters."""
    plain = str(value)[:_LONGEST]
    return "".join(_visible(char) for char in " ".join(plain.split("\n")))


def _visible(char: str) -> str:
    number = ord(char)
    hidden = (
        number < 32
        or 127 <= number < 160
        or 0x200B <= number <= 0x200F
        or 0x2028 <= number <= 0x202E
        or 0x2066 <= number <= 0x2069
        or 0xD800 <= number <= 0xDFFF
        or number == 0xFEFF
    )
    return f"\\u{number:04x}" if hidden else char
