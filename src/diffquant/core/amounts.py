"""Amounts of memory and disk, as people write them."""

from __future__ import annotations

import re

from diffquant.core.errors import UsageError

__all__ = ["bytes_from"]

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{one}b": 1000**power for power, one in enumerate("kmgt", 1)},
    **{f"{one}ib": 1024**power for power, one in enumerate("kmgt", 1)},
}
# A letter alone means what cards are sold by, and what nvidia-smi and PyTorch count in.
_UNITS |= {one: 1024**power for power, one in enumerate("kmgt", 1)}


def bytes_from(text: str, option: str) -> int:
    """Read an amount of bytes: 8GiB, 8GB, 8g, 512MiB; a bare number is bytes.

    GiB counts in 1024, GB in 1000, and a letter alone in 1024.

    Raises:
        UsageError: not an amount, or none.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-z]*)", text.strip().lower())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise UsageError(f"{option} {text}: expected an amount such as 8GiB or 512MB")
    return int(float(found[1]) * unit)
