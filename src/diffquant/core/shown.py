"""Text from strangers on one line of a terminal, a table or a file: control characters as escapes.

Names and metadata come from files: no escape sequence of theirs reaches a terminal, nothing turns
lines around or begins a new one, and half a surrogate pair cannot be encoded at all.
"""

from __future__ import annotations

__all__ = ["CONTROL", "shown"]

CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}"
    for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
}
CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}


def shown(text: str) -> str:
    """A text on one line; what has no place in a line stands as an escape."""
    return text.translate(CONTROL)
