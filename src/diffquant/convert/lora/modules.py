"""The modules of a model under every name a LoRA may call them by, as rows of canonical weights.

    own        the names of the architecture's single files   double_blocks.0.img_attn.qkv
    diffusers  the names Diffusers gives                       transformer_blocks.0.attn.to_q

Each name means rows of canonical weights, so that a module of one naming is found in the other: the
same rows, a part of them, or several modules' rows together. What model that is may come from a
checkpoint's header, or from the table of known models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffquant.convert.architectures.base import Architecture, Component
from diffquant.convert.architectures.parts import architecture_named
from diffquant.convert.lora.base import BaseGuess
from diffquant.convert.lora.bases import Base, bases
from diffquant.convert.lora.places import Module, Names, module_of, modules_of, names_of
from diffquant.convert.match import Match, to_canonical
from diffquant.convert.rules import Piece, Shape, Shapes
from diffquant.core.errors import NotInvertible

__all__ = ["Model", "Part", "known_model", "model_of", "model_with"]

_LINEAR1 = re.compile(r"single_blocks\.\d+\.linear1$")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model.

    Attributes:
        name: denoiser, text_encoder ...
        kind: as in Component.kind.
        folder: where Diffusers keeps it.
        shapes: canonical key -> shape; of a known model, of its matrices alone.
        own: name -> module, in the architecture's own naming.
        diffusers: the same in Diffusers'; that of `own` where there is no other.
        weights, biases: what every name that is understood means.
    """

    name: str
    kind: str
    folder: str
    shapes: Shapes
    own: Mapping[str, Module]
    diffusers: Mapping[str, Module]
    weights: Names
    biases: Names


@dataclass(frozen=True, slots=True)
class Model:
    """A base model as LoRAs see it; `known` where it is a row of the table and not a file."""

    architecture: str
    variant: str
    parts: Mapping[str, Part]
    known: bool


def model_of(match: Match) -> Model:
    """The modules of an opened checkpoint, in the parts that LoRAs are for."""
    parts = {
        one.name: {row.target: row.shape for row in to_canonical(one)}
        for one in match.parts
        if one.name == "denoiser" or one.name.startswith("text_encoder")
    }
    kinds = {one.name: one.kind for one in match.parts}
    return model_with(architecture_named(match.architecture), parts, match.variant, kinds=kinds)


def model_with(
    architecture: Architecture,
    parts: Mapping[str, Shapes],
    variant: str = "",
    *,
    kinds: Mapping[str, str] | None = None,
) -> Model:
    """The modules of weights that are there.

    Args:
        architecture: the model's.
        parts: part name -> canonical part-local key -> shape, norms and biases included.
        variant: of the architecture.
        kinds: part name -> `Component.kind`, where an architecture has several of a name.
    """
    found = {
        name: _part(architecture.component(name, (kinds or {}).get(name, "")), shapes)
        for name, shapes in parts.items()
    }
    return Model(architecture.slug, variant, found, known=False)


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
            if base.encoder == "openclip_g":  # as wide as the encoder; H's is not read
                found["text_projection"] = shape
    return found


def _part(component: Component, shapes: Shapes) -> Part:
    weights = modules_of(component, shapes)
    weights |= {one.name: one for one in _flux_heads(shapes)}
    own = {name: one for name, one in weights.items() if f"{name}.weight" in shapes}
    return Part(
        name=component.name,
        kind=component.kind,
        folder=component.folder,
        shapes=shapes,
        own=own,
        diffusers=_diffusers(component, shapes) or own,
        weights=names_of(weights.values()),
        biases=names_of(modules_of(component, shapes, ".bias").values()),
    )


def _flux_heads(shapes: Shapes) -> Iterable[Module]:
    """USO's and XLabs' `linear1_qkv`: linear1 before the MLP's rows; attention is as wide as K.

    Source: Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet.
    """
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        if _LINEAR1.search(name) and len(shape) == 2:
            rows = 3 * shape[1]
            yield Module(f"{name}_qkv", (Piece(key, 0, rows),), (rows, shape[1]))


def _diffusers(component: Component, shapes: Shapes) -> dict[str, Module]:
    """Modules as Diffusers names and shapes them; empty where that is as the architecture does."""
    if component.same_names:
        return {}
    try:
        rules = component.rules(shapes, "canonical", "diffusers")
    except NotInvertible:
        return {}
    found = (
        module_of(one, shapes)
        for rule in rules
        for one in rule.assignments(shapes)
        if one.target.endswith(".weight")
    )
    return {one.name: one for one in found if one.pieces}
