"""Presets: how a model wants to be run, recognised from what is known about it.

A model distilled to few steps draws mush with the settings of its parent, and the other way round.
`preset_named("auto", clues)` looks, in this order, at attached LoRAs, at weights that only one kind
has, at names, and falls back on what the architecture's makers recommend; it always says why.
`contradictions` compares a request with it. The recipes are those of convert/lora/distilled.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.base import Sampling
from diffquant.convert.lora.distilled import (
    DISTILLED,
    Distilled,
    Recipe,
    distilled_of,
    recipe_of,
    steps_told,
)
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.levels import Levels
from diffquant.runtime.sampler_names import sampler_named

__all__ = ["Clues", "LoraClue", "Preset", "contradictions", "preset_named"]


@dataclass(frozen=True, slots=True)
class LoraClue:
    """An attached LoRA: its names (file name without ending, titles) and the weight it has."""

    names: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Clues:
    """What is known about a model before it runs.

    Attributes:
        architecture: slug.
        variant: as the weights or the pipeline's name show it.
        names: file or folder name without ending, titles in its header, its repository's name.
        time_cond: whether a UNet has time_embedding.cond_proj, which LCM was distilled with.
        guided: whether the denoiser takes a distilled guidance; None where that is not known.
        loras: attached, in order.
    """

    architecture: str
    variant: str = ""
    names: tuple[str, ...] = ()
    time_cond: bool = False
    guided: bool | None = None
    loras: tuple[LoraClue, ...] = ()


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings for a run.

    Attributes:
        name: slug of the recipe, or "default".
        title: for people.
        recipe: the settings; `steps` is what the name tells, where it does.
        why: what it was recognised by.
        source: where the settings come from.
        lora: index of the LoRA it belongs to, None for the model itself.
    """

    name: str
    title: str
    recipe: Recipe
    why: str
    source: str
    lora: int | None = None

    def schedule_for(self, steps: int) -> str | Levels | None:
        """The schedule as `make_sampler` takes it: levels one by one are for their own steps."""
        one = self.recipe
        if len(one.timesteps or one.sigmas) == steps:
            return Levels(one.timesteps, one.sigmas, one.bent)
        return one.schedule or None


def preset_named(name: str, clues: Clues) -> Preset | None:
    """The preset of that name: "auto" recognises one, "none" is none.

    Args:
        name: "auto", "none", or the slug of a recipe for the architecture, in any case, with dashes
            or underscores.
        clues: what is known about the model.

    Raises:
        UnknownFormat: no such recipe.
        UsageError: it is made for another architecture.
    """
    key = re.sub(r"[\s.\-]+", "_", name.strip().lower())
    if key == "none":
        return None
    if key == "auto":
        return _recognised(clues) or _default(clues)
    rows = {row.slug: row for row in DISTILLED}
    if key not in rows:
        raise UnknownFormat(name, ["auto", "none", *rows], what="preset")
    row = rows[key]
    if clues.architecture not in row.bases:
        raise UsageError(
            f"preset {row.slug!r} is made for {', '.join(row.bases)}, not for {clues.architecture}"
        )
    if row.lora:
        for index, lora in enumerate(clues.loras):
            if distilled_of(lora.names, clues.architecture) is row:
                return _made(row, lora.names, "named by the caller", lora=index)
    return _made(row, clues.names, "named by the caller")


def contradictions(
    preset: Preset,
    clues: Clues,
    *,
    steps: int,
    cfg: float,
    sampler: str | None = None,
) -> tuple[str, ...]:
    """What in a request contradicts the model, a sentence each; empty where nothing does.

    Args:
        preset: what the model was recognised as.
        clues: what it was recognised by; weights of LoRAs are judged too.
        steps: of the request.
        cfg: strength of classifier-free guidance.
        sampler: its name in any spelling, None where none is named.
    """
    return tuple(_contradictions(preset, clues, steps, cfg, sampler))


def _contradictions(
    preset: Preset, clues: Clues, steps: int, cfg: float, sampler: str | None
) -> Iterator[str]:
    recipe, title = preset.recipe, preset.title
    if not recipe.few:
        if steps * 4 < recipe.steps:
            yield (
                f"{steps} steps are few for {title}: nothing tells that it was distilled, its "
                f"makers use {recipe.steps}"
            )
        return
    if not recipe.fewest <= steps <= recipe.most:
        wanted = " to ".join(dict.fromkeys((str(recipe.fewest), str(recipe.most))))
        yield f"{title} is made for {wanted} steps, found {steps}"
    if cfg > recipe.cfg_most:
        yield f"cfg {cfg:g} is too much for {title}: its makers use {recipe.cfg:g}"
    elif cfg <= 1 < recipe.cfg:
        yield f"{title} keeps guidance: its makers use cfg {recipe.cfg:g}, found {cfg:g}"
    if sampler is not None:
        found = sampler_named(sampler).sampler
        special = {"lcm", "tcd"}
        if found != recipe.sampler and {found, recipe.sampler} & special:
            yield f"{title} is made for sampler {recipe.sampler}, found {found}"
    if preset.lora is not None:
        weight = clues.loras[preset.lora].weight
        if not recipe.weight / 2 < weight < recipe.weight * 2:
            yield f"{title} is made for weight {recipe.weight:g}, found {weight:g}"
    rows = [distilled_of(lora.names, clues.architecture) for lora in clues.loras]
    several = [row.title for row in rows if row]
    if len(several) > 1:
        yield f"several LoRAs distil to few steps, use one: {', '.join(several)}"


def _recognised(clues: Clues) -> Preset | None:
    for index, lora in enumerate(clues.loras):
        if row := distilled_of(lora.names, clues.architecture):
            why = (
                f"the LoRA's name {_telling(row, lora.names, clues, lora=True)!r} says {row.title}"
            )
            return _made(row, lora.names, why, lora=index)
    if clues.time_cond and clues.architecture in _named("lcm_full").bases:
        why = "its weights take a guidance embedding (time_embedding.cond_proj)"
        return _made(_named("lcm_full"), clues.names, why)
    if row := distilled_of(clues.names, clues.architecture, lora=False):
        why = f"the name {_telling(row, clues.names, clues, lora=False)!r} says {row.title}"
        return _made(row, clues.names, why)
    if clues.architecture == "flux1" and (clues.guided is False or clues.variant == "schnell"):
        why = "its weights take no guidance (no guidance_in): FLUX.1-schnell"
        return _made(_named("flux_schnell"), clues.names, why)
    return None


def _named(slug: str) -> Distilled:
    return next(row for row in DISTILLED if row.slug == slug)


def _telling(row: Distilled, names: Sequence[str], clues: Clues, *, lora: bool) -> str:
    """The first name that tells the row."""
    base = clues.architecture
    return next(name for name in names if distilled_of([name], base, lora=lora) is row)


def _made(row: Distilled, names: Sequence[str], why: str, *, lora: int | None = None) -> Preset:
    recipe, told = recipe_of(row, names), steps_told(names)
    if told is not None and recipe.fewest <= told <= recipe.most:
        recipe = dataclasses.replace(recipe, steps=told)
        if recipe.exact:
            recipe = dataclasses.replace(recipe, fewest=told, most=told)
        why = f"{why}, and {told} steps"
    return Preset(row.slug, row.title, recipe, why, row.source, lora)


def _default(clues: Clues) -> Preset:
    """What the makers of the architecture recommend."""
    row = ARCHITECTURES[clues.architecture]
    sampling: Sampling = row.sampling_for(clues.variant)
    recipe = Recipe(
        sampling.steps,
        1,
        1000,
        cfg=sampling.cfg,
        cfg_most=float("inf"),
        guidance=sampling.guidance,
        sampler="",
        few=False,
    )
    why = f"nothing tells a distilled model: the defaults of {row.title}"
    return Preset("default", row.title, recipe, why, sampling.source)
