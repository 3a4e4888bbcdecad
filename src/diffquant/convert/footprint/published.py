"""PUBLISHED: denoisers as their makers published them, to plan memory with no file at hand.

Names and shapes are in published.json (convert/templates.py says how to read it), written by
scripts/published.py. Text encoders and autoencoders follow from the architecture, as for any file
that lacks them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from diffquant.convert.templates import Templates, shapes_of
from diffquant.core.tensors import ByteArray, Closing, TensorSpec

__all__ = ["Published", "PublishedHeader", "published"]

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True)
class Published:
    """One model.

    Attributes:
        title: for people.
        repository: where it was published.
        shapes: canonical names, as templates.
    """

    title: str
    repository: str
    shapes: Templates

    def header(self, dtype: str = "BF16") -> PublishedHeader:
        """The file it would be, in one dtype; nothing can be read from it."""
        specs = {
            key: TensorSpec(key, dtype, shape) for key, shape in shapes_of(self.shapes).items()
        }
        nbytes = sum(spec.nbytes for spec in specs.values())
        return PublishedHeader(Path(self.repository), specs, nbytes)


@dataclass(slots=True)  # TensorSource has settable attributes
class PublishedHeader(Closing):
    """A TensorSource of names and shapes alone."""

    path: Path
    specs: Mapping[str, TensorSpec]
    nbytes: int
    container: str = "safetensors"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """There is nothing to read: whoever asks has a bug."""
        raise AssertionError(f"{self.path} is a table of shapes: {key} has no bytes")

    def close(self) -> None:
        """Nothing is open."""


@cache
def published() -> tuple[Published, ...]:
    """All of them, in the order people know them."""
    rows = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(Published(row["title"], row["repository"], row["shapes"]) for row in rows)
