"""The recipe of a file: a recipe's text, or what a checkpoint's header says of each tensor.

GGUF types, fp8 and int8 layers of ComfyUI and bitsandbytes nf4 are told from the header and from
marker tensors of at most 4 KiB; recognition gives the canonical keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffquant.convert.binding import bind
from diffquant.convert.detect import Match, detect, to_canonical
from diffquant.convert.logical import LogicalSource
from diffquant.convert.recipes import (
    MAX_RECIPE_NBYTES,
    RECIPE_MAGIC,
    Recipe,
    parse_recipe,
)
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import UnknownArchitecture, shorten
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES

__all__ = ["load_recipe", "type_label"]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file, or take the recipe of any checkpoint from its header.

    Raises:
        MalformedFile, UnknownFormat: a recipe file that breaks its rules, with the line.
        CheckpointError, UnknownArchitecture: neither a recipe nor a checkpoint that is known.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(RECIPE_MAGIC)) == RECIPE_MAGIC.encode():
                raw = RECIPE_MAGIC.encode() + file.read(MAX_RECIPE_NBYTES)
                return parse_recipe(raw, path)
    with open_source(path) as source:
        logical = bind(source)
        try:
            match = detect(logical.specs(), source.metadata, source.configs)
        except UnknownArchitecture as error:
            raise UnknownArchitecture(
                f"no recipe from {path}: {error}", candidates=error.candidates
            ) from None
        formats, notes = _formats_of(logical, match)
        label = type_label(source.metadata, match, logical)
        return Recipe(match.architecture, label, formats, path.name, notes)


def _formats_of(
    logical: LogicalSource, match: Match
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Canonical key -> format of every part, and what cannot be said."""
    formats: dict[str, dict[str, str]] = {}
    unnamed: list[str] = []
    fused: list[str] = []
    for part in match.parts:
        found = formats.setdefault(part.name, {})
        for one in to_canonical(part):
            tensors = [logical.tensors[piece.key] for piece in one.pieces]
            if any(tensor.why for tensor in tensors):
                unnamed.append(one.target)
                continue
            names = {tensor.format or tensor.dtype.lower() for tensor in tensors}
            if len(names) > 1:
                fused.append(one.target)
            if names:
                found[one.target] = max(sorted(names), key=_bits)
    notes = []
    if unnamed:
        notes.append(
            f"recipe: {len(unnamed)} tensors are packed in a way that has no format name here: "
            f"{shorten(unnamed, 3)}"
        )
    if fused:
        notes.append(
            f"recipe: the pieces of {len(fused)} tensors differ in format, the finest is taken: "
            f"{shorten(fused, 3)}"
        )
    return formats, tuple(notes)


def _bits(name: str) -> float:
    if name in FORMATS:
        return FORMATS[name].bits
    row = STORAGE[name.upper()]
    return row.block_nbytes * 8 / row.block_size


def type_label(metadata: Mapping[str, Any], match: Match, logical: LogicalSource) -> str:
    """The type a file calls itself, else the plainest type whose base most packed weights have."""
    ours = metadata.get("diffquant.type")
    if isinstance(ours, str) and ours in TYPES:
        return ours
    number = metadata.get("general.file_type")
    for kind in TYPES.values():
        if kind.file_type is not None and type(number) is int and kind.file_type == number:
            return kind.name
    weights: dict[tuple[bool, str], int] = {}
    for part in match.parts[:1]:  # the denoiser
        tensors = [logical.tensors[part.prefix + key] for key in part.shapes]
        for tensor in (tensor for tensor in tensors if tensor.format):
            rank = tensor.is_quantized, tensor.format
            weights[rank] = weights.get(rank, 0) + tensor.spec.size
    if not weights:
        return ""
    # What is packed names the file, however many convolutions are not.
    packed = [rank for rank in weights if rank[0]] or list(weights)
    _, most = max(packed, key=lambda rank: weights[rank])
    kinds = [kind for kind in TYPES.values() if kind.base == most]
    return min(kinds, key=lambda kind: len(kind.mix)).name if kinds else ""
