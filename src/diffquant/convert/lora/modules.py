"""The modules of a model under every name a LoRA may call them by, as rows of canonical weights.

    own        the names of the architecture's single files   double_blocks.0.img_attn.qkv
    diffusers  the names Diffusers gives                       transformer_blocks.0.attn.to_q

Each name means rows of canonical weights, so that a module of one naming is found in the other: the
same rows, a part of them, or several modules' rows together. What model that is may come from a
checkpoint's header, or from the table of known models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diffquant.convert.architectures.base import Component
from diffquant.convert.architectures.parts import architecture_named
from diffquant.convert.lora.base import BaseGuess
from diffquant.convert.lora.bases import Base, bases
from diffquant.convert.lora.match import module_names
from diffquant.convert.match import Match, to_canonical
from diffquant.convert.rules import Piece, Shape, Shapes
from diffquant.core.errors import NotInvertible

__all__ = ["Model", "Module", "Part", "known_model", "model_of"]

_LINEAR1 = re.compile(r"single_blocks\.\d+\.linear1$")


@dataclass(frozen=True, slots=True)
class Module:
    """One module under one of its names.

    Attributes:
        name: dotted.
        pieces: rows of canonical weights; empty where the model keeps the weight transposed.
        shape: of its weight, (N, K, ...).
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: Shape


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model.

    Attributes:
        name: denoiser, text_encoder ...
        kind: as in Component.kind.
        folder: where Diffusers keeps it.
        own: name -> module, in the architecture's own naming.
        diffusers: the same in Diffusers'; that of `own` where there is no other.
        dotted, underscored: every name that is understood -> module; None where it is ambiguous.
    """

    name: str
    kind: str
    folder: str
    own: Mapping[str, Module]
    diffusers: Mapping[str, Module]
    dotted: Mapping[str, Module | None]
    underscored: Mapping[str, Module | None]


@dataclass(frozen=True, slots=True)
class Model:
    """A base model as LoRAs see it; `known` where it is a row of the table and not a file."""

    architecture: str
    variant: str
    parts: Mapping[str, Part]
    known: bool


def model_of(match: Match) -> Model:
    """The modules of an opened checkpoint."""
    architecture = architecture_named(match.architecture)
    parts = {}
    for one in match.parts:
        if one.name == "denoiser" or one.name.startswith("text_encoder"):
            shapes = {row.target: row.shape for row in to_canonical(one)}
            parts[one.name] = _part(architecture.component(one.name, one.kind), shapes)
    return Model(match.architecture, match.variant, parts, known=False)


def known_model(guess: BaseGuess) -> Model | None:
    """The modules of the model that a LoRA was made for; None where it is not known.

    Widths are those of the published models, whatever the LoRA's are.
    """
    if guess.architecture == "unknown":
        return None
    architecture = architecture_named(guess.architecture)
    parts = {}
    if guess.fit is not None:
        parts["denoiser"] = _part(architecture.component("denoiser"), _weights(guess.fit.base))
    for name, encoder in (guess.encoders or {}).items():
        row = next(
            (one for one in bases() if not one.is_denoiser and one.encoder == encoder.kind), None
        )
        component = next((one for one in architecture.components if one.name == name), None)
        if row is not None and component is not None:
            parts[name] = _part(component, _weights(row))
    return Model(guess.architecture, guess.variant, parts, known=True)


def _weights(base: Base) -> dict[str, Shape]:
    """Canonical keys with shapes, with those vectors that rules look for: the table has none."""
    found: dict[str, Shape] = {}
    for name, shape in base.modules().items():
        found[f"{name}.weight"] = shape
        if name.endswith(".in_layers.2"):  # tells a resnet from a resampling convolution
            found[f"{name.removesuffix('2')}0.weight"] = (shape[1],)
        elif name.endswith(".attn.out_proj"):  # OpenCLIP: q, k and v are one bare parameter
            found[f"{name.removesuffix('out_proj')}in_proj_weight"] = (3 * shape[0], shape[1])
    return found


def _part(component: Component, shapes: Shapes) -> Part:
    try:
        pieces = module_names(component, shapes)
    except NotInvertible:  # the names there are
        pieces = {
            key.removesuffix(".weight"): (Piece(key, 0, shape[0]),)
            for key, shape in shapes.items()
            if key.endswith(".weight") and shape
        }
    pieces.update(_flux_heads(shapes))
    everything = {name: Module(name, rows, _shape(rows, shapes)) for name, rows in pieces.items()}
    own = {name: one for name, one in everything.items() if f"{name}.weight" in shapes}
    other = _diffusers(component, shapes)
    flat: dict[str, Module | None] = {}
    for name, one in everything.items():
        spelled = name.replace(".", "_")
        known = flat.setdefault(spelled, one)
        if known is not None and known.pieces != one.pieces:
            flat[spelled] = None
    return Part(
        name=component.name,
        kind=component.kind,
        folder=component.folder,
        own=own,
        diffusers=other or own,
        dotted=dict(everything),
        underscored=flat,
    )


def _flux_heads(shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """USO's `linear1_qkv`: the rows of linear1 before the MLP's; attention is as wide as K.

    Source: Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet.
    """
    return {
        f"{key.removesuffix('.weight')}_qkv": (Piece(key, 0, 3 * shape[1]),)
        for key, shape in shapes.items()
        if _LINEAR1.search(key.removesuffix(".weight")) and len(shape) == 2
    }


def _shape(pieces: tuple[Piece, ...], shapes: Shapes) -> Shape:
    if not pieces:
        return ()
    return (sum(one.stop - one.start for one in pieces), *shapes[pieces[0].key][1:])


def _diffusers(component: Component, shapes: Shapes) -> dict[str, Module]:
    """Modules as Diffusers names and shapes them; empty where that is as the architecture does."""
    if component.same_names:
        return {}
    try:
        rules = component.rules(shapes, "canonical", "diffusers")
    except NotInvertible:
        return {}
    return {
        name: Module(name, one.pieces, one.shape)
        for rule in rules
        for one in rule.assignments(shapes)
        if one.target.endswith(".weight") and not one.transpose
        for name in (one.target.removesuffix(".weight"),)
    }
