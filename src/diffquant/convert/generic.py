"""Unknown transformers: what can still be said of them, and the Match that quantizes them.

Stacks are numbered modules with the same inner names; widths are what their matrices read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from diffquant.convert.architectures.base import PREFIXES
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.kinds import is_lora
from diffquant.convert.match import Match, PartMatch
from diffquant.convert.rules import Shape
from diffquant.core.errors import UnknownArchitecture, shorten
from diffquant.core.tensors import TensorSpec

__all__ = ["generic_match", "structure"]

_STACK = re.compile(r"^(.*?)\.([0-9]{1,3})\.(.+)$")
_FEW = 2  # blocks that make a stack


def structure(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Say what names and shapes show of a model: stacks, widths, families of tensors."""
    blocks: dict[str, set[int]] = {}
    widths: Counter[int] = Counter()
    matrices: list[str] = []
    for key, shape in shapes.items():
        found = _STACK.match(key)
        if found is None:
            continue
        blocks.setdefault(found[1], set()).add(int(found[2]))
        if len(shape) == 2:
            widths[shape[1]] += 1
            matrices.append(key)
    stacks = {name: len(seen) for name, seen in blocks.items() if len(seen) >= _FEW}
    if not stacks or not matrices:
        return ()
    ranked = sorted(stacks.items(), key=lambda row: -row[1])
    listed = [f"{name} x {number}" for name, number in ranked if "." not in name] or [
        f"{name} x {number}" for name, number in ranked
    ]
    families = {
        row.name: sum(bool(re.search(row.pattern, key)) for key in matrices)
        for row in GENERIC.families
    }
    counted = ", ".join(f"{number} {name}" for name, number in families.items() if number)
    common = ", ".join(str(width) for width, _ in widths.most_common(3))
    told = [
        f"blocks: {shorten(listed, 4)}",
        f"{len(matrices)} matrices in them, most often {common} wide",
    ]
    if counted:
        told.append(f"by their names: {counted}")
    return tuple(told)


def generic_match(specs: Mapping[str, TensorSpec]) -> Match:
    """A Match for any model with numbered blocks; every name stays as it is.

    Raises:
        UnknownArchitecture: an adapter, or nothing that has blocks.
    """
    shapes = {key: spec.shape for key, spec in specs.items()}
    if is_lora(specs):
        raise UnknownArchitecture("this is an adapter (LoRA): --arch generic is for models")
    prefix = _prefix(shapes)
    local = {key[len(prefix) :]: s for key, s in shapes.items() if key.startswith(prefix)}
    told = structure(local)
    if not told:
        raise UnknownArchitecture(
            f"no stack of numbered blocks with matrices among these {len(shapes)} tensors: "
            "expected a transformer; --arch generic packs nothing else"
        )
    part = PartMatch("denoiser", "generic", "canonical", prefix, local, {}, GENERIC.slug)
    left = tuple((key, "outside of the denoiser") for key in shapes if not key.startswith(prefix))
    warning = (
        "generic policy: matrices in numbered blocks are packed, inputs, outputs and embedders are "
        "kept; nobody has tried it on this model, and no loader is known to take the result"
    )
    layout: Literal["single", "diffusers"] = "diffusers" if prefix.endswith("/") else "single"
    return Match(GENERIC.slug, "", layout, (part,), told, left, (warning,))


def _prefix(shapes: Mapping[str, Shape]) -> str:
    """Where the denoiser is: its folder, or a prefix that numbered blocks have."""
    for prefix in ("transformer/", "unet/", *PREFIXES):
        inside = [key for key in shapes if key.startswith(prefix)]
        if any(_STACK.match(key[len(prefix) :]) for key in inside):
            return prefix
    return ""
