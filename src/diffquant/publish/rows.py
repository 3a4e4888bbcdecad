"""How measurements are written for people.

None reads as "-", NaN and infinities as "not finite", identical pictures as "identical": a reader
can always tell "not measured" from "measured, and bad".
"""

from __future__ import annotations

import math

__all__ = ["decibel_text", "number_text", "size_text"]


def size_text(nbytes: float) -> str:
    """Bytes with three digits and a binary unit: 13.4 MiB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5 or unit == "GiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def number_text(value: float | None, digits: int) -> str:
    """A measurement with fixed digits, "-" when there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def decibel_text(value: float | None, *, identical: bool = False) -> str:
    """A PSNR with its unit, or "identical"."""
    if identical:
        return "identical"
    text = number_text(value, 1)
    return f"{text} dB" if text[-1].isdigit() else text
