"""Matching: one component's signatures against names and shapes, and what came near.

A component is looked for below a prefix; the keys below each prefix are picked once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.base import Component, Facts, Layout
from diffquant.convert.architectures.names import Named
from diffquant.convert.generic import structure
from diffquant.convert.kinds import is_lora
from diffquant.convert.rules import Shape
from diffquant.convert.strangers import packing, stranger
from diffquant.core.errors import UnknownArchitecture, shorten
from diffquant.core.tensors import TensorSpec

__all__ = ["Below", "Found", "Near", "find", "unknown"]


class Found(NamedTuple):
    """A component recognised under a prefix."""

    component: Component
    layout: Layout
    prefix: str
    shapes: Named
    ignored: tuple[tuple[str, str], ...]
    facts: Facts


class Near(NamedTuple):
    """A denoiser that was not quite recognised."""

    slug: str
    share: float
    missing: tuple[str, ...]
    why: str


class Below:
    """The keys of a source below a prefix, without it; what is worked out, is so once."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = Named(shapes)
        self._heads = {_head(key) for key in shapes}
        self._found: dict[str, Named] = {"": self._shapes}
        self._facts: dict[tuple[object, ...], Facts] = {}
        self._ends = (min(shapes), max(shapes)) if shapes else ("", "")

    def __getitem__(self, prefix: str) -> Named:
        if prefix not in self._found:
            keys = self._shapes if _head(prefix) in self._heads else ()
            cut = len(prefix)
            self._found[prefix] = Named(
                (key[cut:], self._shapes[key]) for key in keys if key.startswith(prefix)
            )
        return self._found[prefix]

    def facts(self, component: Component, layout: Layout, prefix: str, kept: Named) -> Facts:
        """What the names say; relatives that read them alike share the answer."""
        reading = (component.links, component.facts, component.same_names, component.ignored)
        key = (*reading, layout, prefix)
        if key not in self._facts:
            self._facts[key] = component.facts_of(kept, layout)
        return self._facts[key]

    def has_all(self, prefix: str) -> bool:
        """Whether every key is below the prefix."""
        return all(key.startswith(prefix) for key in self._ends)  # then those between do too


def _head(key: str) -> str:
    """The first segment of a key or prefix; folders end with a slash."""
    return key.partition("/")[0].partition(".")[0]


def find(component: Component, below: Below, prefix: str) -> Found | Near | None:
    """Look for a component below a prefix: found, nearly found, or nothing there."""
    local = below[prefix]
    if not local:
        return None
    near: Near | None = None
    for layout, signature in component.signatures.items():
        missing = signature.missing(local)
        share = 1 - len(missing) / len(signature.required)
        why = f"lacks {shorten(missing, 3)}"
        if not missing:
            if foreign := signature.foreign(local):
                why = f"has {foreign[0]}"
            else:
                found = _accept(component, layout, prefix, below)
                if isinstance(found, Found):
                    return found
                why = found
        if share and (near is None or share > near.share):
            near = Near("", share, missing, why)
    return near


def _accept(component: Component, layout: Layout, prefix: str, below: Below) -> Found | str:
    """Check the facts; a signature's own keys are never ignored."""
    local = below[prefix]
    required = component.signatures[layout].required
    ignored = {
        key: reason
        for pattern, reason in component.ignored
        for key in local
        if re.search(pattern, key) and key not in required
    }
    kept = local
    if ignored:
        kept = Named((key, shape) for key, shape in local.items() if key not in ignored)
    facts = below.facts(component, layout, prefix, kept)
    for name, allowed in component.where.items():
        if facts.get(name) not in allowed:
            listed = " or ".join(map(str, allowed))
            return f"has {name.lstrip('_')} {facts.get(name)}, expected {listed}"
    if component.same_names and layout == "canonical" and prefix.endswith("/"):
        layout = "diffusers"
    full = tuple((prefix + key, reason) for key, reason in ignored.items())
    return Found(component, layout, prefix, kept, full, facts)


def unknown(specs: Mapping[str, TensorSpec], near: Sequence[Near]) -> UnknownArchitecture:
    """The error that says what came nearest to these tensors, and what it lacks."""
    best: dict[str, Near] = {}
    for one in near:
        if one.slug not in best or one.share > best[one.slug].share:
            best[one.slug] = one
    ranked = sorted(best.values(), key=lambda one: -one.share)[:3]
    shapes = {key: spec.shape for key, spec in specs.items()}
    if told := stranger(shapes):
        head, ranked = f"this is {told}, no diffusion model", []
    elif told := packing(shapes):
        head, ranked = f"these tensors are {told}", []
    elif is_lora(specs):
        head = "this is an adapter (LoRA), not a model: give it with --lora"
    elif not specs:
        head = "there are no tensors in it"
    else:
        head = f"no known architecture has these {len(specs)} tensors"
        if structure(shapes):
            head += " (--arch generic packs a transformer's blocks all the same)"
    nearest = "; ".join(f"{one.slug} has {one.share:.0%} of its marks, {one.why}" for one in ranked)
    message = f"{head}; nearest: {nearest}" if nearest else head
    return UnknownArchitecture(
        f"{message} (known: {', '.join(ARCHITECTURES)})",
        candidates=tuple((one.slug, one.missing) for one in ranked),
    )
