"""Activations of diffusion transformers: tokens times widths, by the rows of each family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from diffquant.convert.footprint.moments import Buffer, Moment
from diffquant.convert.footprint.transformer_rows import (
    TRANSFORMERS,
    Phase,
    Term,
    TransformerRow,
)
from diffquant.convert.footprint.transformer_runtime import RUNTIME
from diffquant.convert.rules import Shapes

__all__ = ["row_for", "transformer_moments"]

# What reads the timestep and not the tokens: its outputs are short.
_MODULATION = re.compile(r"mod|adaln|norm|scale_shift|gate\.weight$", re.IGNORECASE)
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
_LEAST_DEPTH = 2

# Of the measured rows 5 to 9 widths and 2 to 4 hidden widths live at once; float32 copies for
# rotary positions count as two widths each.
_THUMB = (
    Phase(
        "widest block, by a rule of thumb",
        (
            Term("residuals, norms, q, k, v", width=8, tensors=8),
            Term("hidden, activation, product", hidden=4, tensors=4),
        ),
    ),
)
_THUMB_TOKENS = 512


def row_for(kind: str, shapes: Shapes, *, ours: bool = False) -> TransformerRow | None:
    """The row of a kind of denoiser; a rule of thumb for those nobody measured.

    Args:
        kind: of the part.
        shapes: canonical part-local names.
        ours: as the runtime of this package runs it, where that differs.

    Returns:
        None: it is no transformer as far as its names tell.
    """
    row = (RUNTIME.get(kind) if ours else None) or TRANSFORMERS.get(kind)
    if row is not None and row.sizes and all(key in shapes for key, _ in row.sizes.values()):
        return row
    sizes = _block_sizes(shapes)
    if not sizes:
        return None
    if row is not None and not row.sizes:
        return replace(row, sizes=sizes)
    return TransformerRow(sizes, _THUMB, _THUMB_TOKENS, joined=True, measured=False)


def transformer_moments(
    row: TransformerRow,
    shapes: Shapes,
    *,
    image_tokens: int,
    text_tokens: int,
    batch: int,
    itemsize: int,
) -> Iterator[Moment]:
    """Walk the phases of the widest block.

    Args:
        row: of the kind of denoiser.
        shapes: part-local names that `row.sizes` points into.
        image_tokens: per sample.
        text_tokens: per sample.
        batch: samples in the call, guidance counted where the row joins it.
        itemsize: bytes of a number of the compute dtype.
    """
    sizes = {name: shapes[key][axis] for name, (key, axis) in row.sizes.items()}
    tokens: Mapping[str, int] = {
        "image": image_tokens,
        "text": text_tokens,
        "all": image_tokens + text_tokens,
    }
    for phase in row.phases:
        if phase.needs and phase.needs not in shapes:
            continue
        yield Moment(
            phase.where,
            tuple(
                Buffer(
                    term.label,
                    int(
                        batch
                        * tokens[term.tokens]
                        * (term.width * sizes["width"] + term.hidden * sizes["hidden"])
                        * (term.itemsize or itemsize)
                    ),
                    term.tensors,
                )
                for term in phase.terms
            ),
        )


def _block_sizes(shapes: Shapes) -> dict[str, tuple[str, int]]:
    """Where the width and the hidden width of the heaviest list of blocks stand."""
    lists: Counter[str] = Counter()
    depths: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        found = _BLOCK.match(key)
        if found is not None and len(shape) == 2:
            lists[found[1]] += shape[0] * shape[1]
            depths.setdefault(found[1], set()).add(found[2])
    deep = [name for name, _ in lists.most_common() if len(depths[name]) >= _LEAST_DEPTH]
    if not deep:
        return {}
    first = f"{deep[0]}.0."
    inside = {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(first) and len(shape) == 2 and not _MODULATION.search(key[len(first) :])
    }
    if not inside:
        return {}
    width = Counter(shape[1] for shape in inside.values()).most_common(1)[0][0]
    narrow = next(key for key, shape in inside.items() if shape[1] == width)
    wide = max(inside, key=lambda key: inside[key][1])
    return {"width": (narrow, 1), "hidden": (wide, 1)}
