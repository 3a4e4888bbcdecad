"""The sample grid: a PNG with a column per type and a row per prompt.

::

               original     q8_0         q4_k_s
                            4.1 MiB      2.4 MiB
    a small    +--------+   +--------+   +--------+
    red circle |        |   |        |   |        |
               +--------+   +--------+   +--------+

The bytes depend on the arguments only: Pillow's bundled font, no dates, no text chunks. That font
(a subset of Aileron) has ASCII letters only; accents are dropped and other letters shown as "?".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffquant.publish.rows import decibel_text, size_text
from diffquant.runtime.comparison import Row

__all__ = ["column_label", "sample_grid", "to_image"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Label = tuple[list[str], Font, str]  # lines, font, colour

_SMALLEST, _LARGEST = 160, 384  # pixels of a picture's longer side in the grid
_WHOLE = 200  # whole-number enlargement is kept up to here: it shows true pixels
_GAP, _MARGIN, _LABELS = 10, 16, 168
_INK, _GREY, _PAPER = "#161616", "#5c5c5c", "#ffffff"


def column_label(row: Row) -> str:
    """Name, and on a second line size and PSNR, as `sample_grid` draws them."""
    parts = [] if row.nbytes is None else [size_text(row.nbytes)]
    psnr = row.values["psnr"].mean if "psnr" in row.values else None
    if row.identical or psnr is not None:
        parts.append(decibel_text(psnr, identical=row.identical))
    return f"{row.type or row.name}\n{', '.join(parts)}"


def to_image(picture: NDArray[np.float32]) -> Image.Image:
    """Round an (H, W, 3) float picture in [0, 1] to 8 bits; what is not finite becomes black."""
    values = np.nan_to_num(picture, nan=0.0, posinf=0.0, neginf=0.0)
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def sample_grid(
    columns: Sequence[tuple[str, Sequence[NDArray[np.float32]]]],
    row_labels: Sequence[str],
    path: Path,
) -> None:
    """Draw the grid and write it as PNG.

    Args:
        columns: (label, one (H, W, 3) float picture in [0, 1] per row), the original first. A
            label's first line is the type; what follows a line break is drawn smaller and grey.
        row_labels: prompts, wrapped and cut to the height of their row.
        path: target, overwritten.

    Raises:
        ValueError: there is nothing to draw, or a column has not one picture per row.
    """
    if not columns or not row_labels:
        raise ValueError("a grid needs a column and a row at least")
    for label, pictures in columns:
        if len(pictures) != len(row_labels):
            raise ValueError(
                f"column {label!r} has {len(pictures)} pictures for {len(row_labels)} rows"
            )
    cells = [[_scaled(to_image(picture)) for picture in pictures] for _, pictures in columns]
    widths = [max(cell.width for cell in column) for column in cells]
    heights = [max(cell.height for cell in row) for row in zip(*cells, strict=True)]
    heads = [_column_head(label, width) for (label, _), width in zip(columns, widths, strict=True)]
    top = _MARGIN + max(_text_height(head) for head in heads) + _GAP
    sheet = Image.new(
        "RGB",
        (
            _MARGIN + _LABELS + sum(_GAP + width for width in widths) + _MARGIN,
            top + sum(_GAP + height for height in heights) - _GAP + _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    y = top
    for text, height in zip(row_labels, heights, strict=True):
        font = ImageFont.load_default(14)
        lines = _wrap(text, font, _LABELS, height // _line_height(font))
        _write(draw, (_MARGIN, y), [(lines, font, _INK)])
        y += height + _GAP
    x = _MARGIN + _LABELS + _GAP
    for head, column, width in zip(heads, cells, widths, strict=True):
        _write(draw, (x, top - _GAP - _text_height(head)), head)
        y = top
        for cell, height in zip(column, heights, strict=True):
            sheet.paste(cell, (x, y))
            y += height + _GAP
        x += width + _GAP
    sheet.save(path, "PNG", optimize=True)


def _scaled(image: Image.Image) -> Image.Image:
    """Bring the longer side into [160, 384]: whole factors by nearest, others by Lanczos."""
    side = max(image.size)
    goal = min(max(side, _SMALLEST), _LARGEST)
    if goal == side:
        return image
    whole = -(-_SMALLEST // side)
    if goal > side and whole * side <= _WHOLE:
        size = (image.width * whole, image.height * whole)
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(1, image.width * goal // side), max(1, image.height * goal // side))
    return image.resize(size, Image.Resampling.LANCZOS)


def _column_head(label: str, width: int) -> list[Label]:
    first, _, rest = label.partition("\n")
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    head: list[Label] = [(_wrap(first, large, width, 2), large, _INK)]
    head += [(_wrap(line, small, width, 2), small, _GREY) for line in rest.splitlines()]
    return head


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], labels: Sequence[Label]) -> None:
    x, y = corner
    for lines, font, colour in labels:
        for line in lines:
            draw.text((x, y), line, font=font, fill=colour)
            y += _line_height(font)


def _text_height(labels: Sequence[Label]) -> int:
    return sum(len(lines) * _line_height(font) for lines, font, _ in labels)


def _line_height(font: Font) -> int:
    box = font.getbbox("Apg")
    return int(box[3]) + 4


def _wrap(text: str, font: Font, width: int, limit: int) -> list[str]:
    """Break at spaces, and inside words wider than the line; a cut ends in three dots."""
    lines: list[str] = []
    line = ""
    for word in _ascii(text).split():
        joined = f"{line} {word}".lstrip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(lines) <= limit:
            cut = next(n for n in range(1, len(word) + 1) if font.getlength(word[: n + 1]) > width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
        if len(lines) > limit:
            break
    lines.append(line)
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: limit - 1], f"{last.rstrip()}..."]


def _ascii(text: str) -> str:
    """Letters that the bundled font can draw."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c.isspace() else "?" for c in plain)
