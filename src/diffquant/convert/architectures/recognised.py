"""Known: a part that is recognised by name, size and kind, and never rewritten.

Rows of these are tables of names (recognised_vaes.py, recognised_encoders.py): what a file is can
be said of many more models than anything here converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature, Variant
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["Known"]


@dataclass(frozen=True, slots=True)
class Known:
    """One part.

    Attributes:
        kind: its slug.
        title: its name for people.
        required: by layout, the keys that must all be there.
        forbidden: beginnings of keys that must not be there.
        sizes: fact -> (key, axis), the first key that is there; one key per naming.
        counts: fact -> module lists whose length it is, one per naming.
        where: facts it must have: name -> allowed values.
        members: which size or relative it is; the first that fits.
        name: vae, text_encoder or image_encoder.
        prefixes: where single files of a whole model have it.
    """

    kind: str
    title: str
    required: Mapping[Layout, tuple[str, ...]]
    forbidden: tuple[str, ...] = ()
    sizes: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    members: tuple[Variant, ...] = ()
    name: str = "vae"
    prefixes: tuple[str, ...] = ()

    def component(self, prefixes: tuple[str, ...] | None = None) -> Component:
        """The part as a component, at these prefixes in single files."""
        return Component(
            name=self.name,
            kind=self.kind,
            folder=self.name,
            prefixes=self.prefixes if prefixes is None else prefixes,
            signatures={
                layout: Signature(keys, self.forbidden) for layout, keys in self.required.items()
            },
            links=None,
            facts=partial(_facts, self),
            where=self.where,
            same_names=True,
        )


def _facts(row: Known, shapes: Shapes) -> Facts:
    """Sizes from whichever naming has them."""
    found: Facts = {}
    for name, keys in row.sizes.items():
        sizes = (width(shapes, key, axis) for key, axis in keys)
        found[name] = next((size for size in sizes if size is not None), None)
    for name, lists in row.counts.items():
        found[name] = max(count(shapes, one) for one in lists) or None
    return found
