"""Names of many tensors as few lines of text: numbers cut out, then listed as products of ranges.

    "double_blocks.#.img_attn.qkv": {"0-18": "9216x3072"}

stands for 19 modules of one shape. The tables of published models are kept this way (bases.json of
convert/lora, published.json of convert/footprint); scripts/lora_bases.py and scripts/published.py
write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TypeAlias

from diffquant.convert.rules import Shape

__all__ = ["Numbers", "Templates", "expanded", "numbered", "shapes_of", "template"]

_NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=[._]|$)")
Templates: TypeAlias = Mapping[str, Mapping[str, str]]  # template -> numbers -> shape, "9216x3072"
Numbers: TypeAlias = tuple[int, ...]


def template(name: str) -> tuple[str, Numbers]:
    """Cut the numbers out: "blocks.3.ff.net.0" -> ("blocks.#.ff.net.#", (3, 0))."""
    return _NUMBER.sub("#", name), tuple(int(one) for one in _NUMBER.findall(name))


def numbered(text: str, numbers: Numbers) -> str:
    """Put the numbers back into a template."""
    rest = iter(numbers)
    return "".join(str(next(rest)) if one == "#" else one for one in text)


def expanded(text: str) -> Iterator[Numbers]:
    """Read "1-2 0, 4 0+2", products of ranges with a space between places."""
    for row in text.split(", "):
        yield from product(*map(_range, row.split()))


def shapes_of(templates: Templates) -> dict[str, Shape]:
    """Every name, and its shape."""
    return {
        numbered(text, numbers): tuple(map(int, shape.split("x")))
        for text, rows in templates.items()
        for ranges, shape in rows.items()
        for numbers in expanded(ranges)
    }


def _range(text: str) -> list[int]:
    found: list[int] = []
    for run in text.split("+"):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
