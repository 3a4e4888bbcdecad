"""The models LoRAs are trained on: every matrix and kernel of each, by name and shape.

A LoRA's header names modules and gives the shapes of their weights, so what it was made for is a
look-up: `bases.json` holds the full-size models as templates (convert/templates.py),

    "double_blocks.#.img_attn.qkv": {"0-18": "9216x3072"}

for the names an architecture's own files use ("names") and those of Diffusers and ComfyUI
("other"). A row that is `like` another holds what differs from it. scripts/lora_bases.py writes the
file from published configs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.rules import Shape
from diffquant.convert.templates import Numbers, Templates, expanded, shapes_of

__all__ = ["Base", "bases"]

_FILE = Path(__file__).with_name("bases.json")


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """One model. Architecture and variant are those of convert.detect, a part's for encoders.

    Attributes:
        names: template -> numbers -> shape, as the architecture's own files name modules.
        other: the same in the namings of Diffusers and ComfyUI, where they differ.
        index: of the row; a lower one is preferred where several fit.
    """

    architecture: str
    variant: str
    names: Templates
    other: Templates
    index: int

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a whole architecture, not a text encoder."""
        return self.architecture in ARCHITECTURES

    @property
    def encoder(self) -> str:
        """Slug of a text encoder: its variant, told from others of the same name."""
        known = {"qwen2_vl_text": "qwen2_vl_", "qwen3_text": "qwen3_", "gemma2_text": "gemma2_"}
        known["mistral_text"] = "mistral_"
        return known.get(self.architecture, "") + self.variant

    def weights(self, text: str, *, underscored: bool) -> Mapping[Numbers, Shape]:
        """Numbers -> shape of a template's weights; empty where the model has no such module."""
        return _weights(self, text, underscored)

    def has(self, text: str, *, underscored: bool) -> bool:
        """Whether the model has such modules, whatever their numbers."""
        return any(text in _spelled(self, which, underscored) for which in ("names", "other"))

    def is_own(self, text: str, *, underscored: bool) -> bool:
        """Whether the template is of the architecture's own naming."""
        return text in _spelled(self, "names", underscored)

    def modules(self) -> dict[str, Shape]:
        """Every module as the architecture's own files name it, and its weight's shape."""
        return shapes_of(self.names)

    def templates(self, *, own: bool, underscored: bool) -> tuple[str, ...]:
        """Every template of one naming."""
        return tuple(_spelled(self, "names" if own else "other", underscored))


@cache
def bases() -> tuple[Base, ...]:
    """All of them, the preferred first."""
    rows = json.loads(_FILE.read_text(encoding="utf-8"))
    found: list[Base] = []
    for index, row in enumerate(rows):
        names, other = row["names"], row["other"]
        if "like" in row:
            names = _overlaid(found[row["like"]].names, names)
            other = _overlaid(found[row["like"]].other, other)
        found.append(Base(row["architecture"], row["variant"], names, other, index))
    return tuple(found)


def _overlaid(base: Templates, changes: Templates) -> Templates:
    """Another row's templates with changes; an empty one is taken away."""
    return {text: numbers for text, numbers in {**base, **changes}.items() if numbers}


@cache
def _spelled(base: Base, which: str, underscored: bool) -> dict[str, Mapping[str, str]]:
    templates: Templates = getattr(base, which)
    if not underscored:
        return dict(templates)
    return {text.replace(".", "_"): numbers for text, numbers in templates.items()}


@cache
def _weights(base: Base, text: str, underscored: bool) -> dict[Numbers, Shape]:
    found: dict[Numbers, Shape] = {}
    for which in ("other", "names"):
        for numbers, shape in _spelled(base, which, underscored).get(text, {}).items():
            size = tuple(map(int, shape.split("x")))
            found.update(dict.fromkeys(expanded(numbers), size))
    return found
