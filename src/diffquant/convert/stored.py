"""Stored tensors as a target meets them: those a plan would write, and those a file has.

The two go through the same questions (targets.py), so that what is quantized for a program and what
is said of a file for that program cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.parts import find_architecture
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match
from diffquant.convert.step import Step
from diffquant.convert.targets import Stored

__all__ = ["is_layer", "stored_in", "stored_tensors", "tables_of"]

Shape = tuple[int, ...]


def tables_of(architecture: Architecture) -> tuple[str, ...]:
    """Patterns of the denoiser's keys that are tables, and no layer's matrix."""
    return tuple(row.pattern for row in architecture.keep if row.table)


def is_layer(key: str, shape: Shape, tables: Sequence[str]) -> bool:
    """Whether a weight is a layer's matrix or kernel: the only place loaders unpack."""
    table = any(re.search(pattern, key) for pattern in tables)
    return len(shape) > 1 and key.endswith(".weight") and not table


def stored_tensors(architecture: Architecture, steps: Iterable[Step]) -> tuple[Stored, ...]:
    """The outputs of steps as a target meets them."""
    tables = tables_of(architecture)
    return tuple(
        Stored(
            step.target,
            step.stored,
            step.assignment.shape,
            is_layer(step.key, step.assignment.shape, tables),
        )
        for step in steps
    )


def stored_in(logical: LogicalSource, match: Match | None) -> tuple[Stored, ...]:
    """The tensors of an opened file as a target meets them, in file order.

    Tables are told by canonical names; a file of unknown architecture has none.
    """
    prefixes: dict[str, str] = {}
    tables: tuple[str, ...] = ()
    if match is not None:
        row = find_architecture(match.architecture)
        tables = tables_of(row) if row is not None else ()
        prefixes = {part.prefix + key: part.prefix for part in match.parts for key in part.shapes}
    return tuple(
        Stored(
            key,
            tensor.format or tensor.foreign or tensor.dtype.lower(),
            tensor.shape,
            is_layer(key.removeprefix(prefixes.get(key, "")), tensor.shape, tables),
        )
        for key, tensor in logical.tensors.items()
    )
