"""Sample pictures of a release: checked to be pictures, renamed to safe names, their prompts read.

A picture goes to `samples/` byte for byte. Its prompt comes from the text that generate, A1111 and
ComfyUI leave in a PNG, and becomes the caption and a `widget` row, the gallery that the Hub draws.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import CheckpointError, MalformedFile, UsageError
from diffquant.runtime.png_text import png_texts

__all__ = ["GRID_NAME", "Sample", "read_samples"]

GRID_NAME = "samples/grid.png"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_MAX_NBYTES = 64 << 20
_MAX_COUNT = 64
_END_OF_PROMPT = re.compile(r"\n(?:Negative prompt:|Steps:)")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture: where it lies, its path in the repository, its prompt or ""."""

    path: Path
    name: str
    prompt: str


def read_samples(places: Iterable[Path], grid: Path | None = None) -> tuple[Sample, ...]:
    """Find and check pictures.

    Args:
        places: pictures, or folders of them.
        grid: a picture that is shown large, before the others.

    Raises:
        UsageError: no such picture, or too many.
        MalformedFile: no picture.
    """
    found = [Sample(grid, GRID_NAME, "")] if grid is not None else []
    if grid is not None and _kind(grid) != ".png":
        raise UsageError(f"--grid {grid}: expected a PNG")
    taken = {GRID_NAME}
    for path in _pictures(places):
        suffix = _kind(path)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:80] or "picture"
        name, count = f"samples/{stem}{suffix}", 2
        while name.lower() in taken:
            name, count = f"samples/{stem}-{count}{suffix}", count + 1
        taken.add(name.lower())
        found.append(Sample(path, name, _prompt(path) if suffix == ".png" else ""))
    if len(found) > _MAX_COUNT:
        raise UsageError(f"{len(found)} sample pictures: a card shows at most {_MAX_COUNT}")
    return tuple(found)


def _pictures(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            inside = sorted(
                one
                for one in place.iterdir()
                if one.suffix.lower() in _SUFFIXES and one.is_file() and one.name[0] != "."
            )
            if not inside:
                raise UsageError(f"--samples {place}: no picture in it ({', '.join(_SUFFIXES)})")
            yield from inside
        else:
            yield place


def _kind(path: Path) -> str:
    """Suffix of a picture by its content."""
    from PIL import Image

    if not path.is_file():
        raise UsageError(f"{path}: no such picture")
    if path.stat().st_size > _MAX_NBYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes, a sample has at most {_MAX_NBYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(_KINDS)) as picture:
                kind = picture.format or ""
                picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise MalformedFile(f"no picture: {str(error)[:120]}", path=path) from None
    return _KINDS[kind]


def _prompt(path: Path) -> str:
    try:
        told = png_texts(path).get("parameters", "")
    except CheckpointError:  # the picture itself is whole: it goes without a caption
        return ""
    return _END_OF_PROMPT.split(told, maxsplit=1)[0].strip() if "Steps:" in told else ""
