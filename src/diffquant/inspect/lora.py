"""LoraReport: what an adapter file is, for which model, how it was made and what is wrong with it.

From the header and single numbers; `deep` reads the parts themselves, one at a time, for NaN,
infinity and adapters that are zero and so change nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.lora.alphas import peft_config
from diffquant.convert.lora.base import UNKNOWN, BaseGuess, guess_base
from diffquant.convert.lora.claims import claims_of, denied
from diffquant.convert.lora.distilled import distilled_of
from diffquant.convert.lora.group import Adapter, AdapterFile, group_adapters
from diffquant.convert.lora.strangers import stranger_of
from diffquant.convert.lora.values import odd_values
from diffquant.core.errors import MalformedFile, shorten
from diffquant.inspect.lora_parts import LoraBlocks, LoraPart, touched_blocks, touched_parts
from diffquant.inspect.lora_training import Training, training_of
from diffquant.inspect.subject import Subject

__all__ = ["LoraHint", "LoraReport", "describe_lora"]

# A habit of names: whose files look so. Said where several models fit alike.
_HABITS = {"bare": ("qwen_image",), "fal_kontext": ("flux1",), "wan_fun": ("wan",)}


@dataclass(frozen=True, slots=True)
class LoraHint:
    """What a name alone suggests: a step-distilled recipe. Nothing in the weights proves it."""

    name: str
    title: str
    advice: str
    source: str


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What one adapter file is.

    Attributes:
        naming: slug of whose names it has; naming_title for people.
        spelling: "original" or "diffusers" module names, "" where there is one naming only.
        kinds: LoRA, LoCon, DoRA ... -> adapted modules.
        base: architecture, or "unknown".
        variant: member of the family, where only one fits; `variants` all that fit.
        also: other architectures that fit as well.
        candidates: for an unknown base, the nearest and what they lack.
        ranks: rank -> modules; "" -> those without one.
        alphas: alpha as stated -> modules; "" -> where it is not: alpha is the rank there.
        scale: what most deltas are multiplied by at weight 1, None for kinds without one.
        rank_stabilised: alpha is divided by the root of the rank (use_rslora).
        parts: those touched, the denoiser first.
        blocks: stacks of blocks the denoiser's modules are in.
        triggers: words that call it up, the most frequent first.
        training: what the header says of its making.
        hint: a step-distilled recipe that names suggest.
        vectors: token vectors inside (pivotal tuning).
        malformed: (module, reason).
        zero: modules whose adapter is zero; only where `deep`.
        deep: whether the values were read.
        evidence: what was concluded from what.
        warnings: what a user should know before using it.
    """

    naming: str
    naming_title: str
    spelling: str
    kinds: Mapping[str, int]
    base: str
    variant: str
    variants: tuple[str, ...]
    also: tuple[str, ...]
    candidates: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    scale: float | None
    rank_stabilised: bool
    parts: tuple[LoraPart, ...]
    blocks: tuple[LoraBlocks, ...]
    triggers: tuple[str, ...]
    training: Training
    hint: LoraHint | None
    vectors: tuple[str, ...]
    malformed: tuple[tuple[str, str], ...]
    zero: tuple[str, ...]
    deep: bool
    evidence: tuple[str, ...]
    warnings: tuple[str, ...]


def describe_lora(subject: Subject, *, deep: bool = False) -> LoraReport | None:
    """Describe an adapter file; None for a file without adapters.

    Args:
        subject: the opened file.
        deep: read every part, for NaN, infinity and zeros.
    """
    config, unread = _config(subject)
    file = group_adapters(subject.source, config)
    if file is None:
        return None
    claims = claims_of(subject.source.metadata)
    named = [slug for claim in claims for slug in claim.architectures]
    guess = guess_base(file.adapters, (*named, *_HABITS.get(file.naming.slug, ())))
    values = odd_values(subject.source, file.adapters) if deep else {}
    training = training_of(subject.source.metadata)
    malformed = [(one.name, one.reason) for one in file.broken]
    malformed += [(name, why) for name, why in values.items() if why != "zero"]
    zero = tuple(name for name, why in values.items() if why == "zero")
    known = guess.architecture != UNKNOWN
    return LoraReport(
        naming=file.naming.slug,
        naming_title=file.naming.title,
        spelling=_spelling(guess),
        kinds=dict(Counter(one.label for one in file.adapters).most_common()),
        base=guess.architecture,
        variant="control" if _is_control(file, guess) else guess.variant,
        variants=guess.variants,
        also=guess.also,
        candidates=guess.candidates or {},
        ranks=_counted(one.rank for one in file.adapters),
        alphas=_counted(one.alpha for one in file.adapters),
        scale=_scale(file.adapters),
        rank_stabilised=any(one.rooted for one in file.adapters),
        parts=tuple(touched_parts(file.adapters, guess)),
        blocks=tuple(touched_blocks(file.adapters, guess)),
        triggers=training.triggers,
        training=training,
        hint=_hint(subject, training, guess.architecture),
        vectors=file.vectors,
        malformed=tuple(malformed),
        zero=zero,
        deep=deep,
        evidence=(f"names: {file.naming.title}", *guess.evidence),
        warnings=(
            *(denied(claims, guess.architecture) if known else ()),
            *unread,
            *_warnings(file, malformed, zero),
        ),
    )


def _config(subject: Subject) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """PEFT's configuration, and a warning where there is one that cannot be read."""
    try:
        return peft_config(subject.source), ()
    except MalformedFile as error:
        return {}, (f"{error}: alphas it states are not known",)


def _counted(values: Iterator[float | int | None]) -> dict[str, int]:
    """Number as text -> how many, the most frequent first; "" for none."""
    counts = Counter("" if value is None else f"{value:g}" for value in values)
    return dict(counts.most_common())


def _scale(adapters: Sequence[Adapter]) -> float | None:
    """The commonest alpha / rank."""
    scales: Counter[float] = Counter()
    for one in adapters:
        if one.rank:
            root = math.sqrt(one.rank) if one.rooted else one.rank
            scales[1.0 if one.alpha is None else one.alpha / root] += 1
    return scales.most_common(1)[0][0] if scales else None


def _spelling(guess: BaseGuess) -> str:
    if guess.fit is None or not guess.fit.base.other:
        return ""
    return "original" if guess.fit.own else "diffusers"


def _is_control(file: AdapterFile, guess: BaseGuess) -> bool:
    return file.naming.slug == "bfl_control" and guess.architecture == "flux1"


def _hint(subject: Subject, training: Training, architecture: str) -> LoraHint | None:
    names = [Path(subject.path).stem, training.title, training.output_name]
    row = distilled_of([name for name in names if name], architecture)
    return LoraHint(row.slug, row.title, row.advice, row.source) if row else None


def _warnings(
    file: AdapterFile, malformed: Sequence[tuple[str, str]], zero: Sequence[str]
) -> Iterator[str]:
    if malformed:
        listed = shorten([f"{name} ({why})" for name, why in malformed], 2)
        yield f"{len(malformed)} layers are malformed: {listed}"
    if zero and len(zero) == len(file.adapters):
        yield "every adapter is zero: it changes nothing"
    elif zero:
        yield f"{len(zero)} adapters are zero and change nothing: {shorten(zero, 2)}"
    still = [one.name for one in file.adapters if one.alpha == 0 and one.rank]
    if still:
        yield f"alpha is 0 in {len(still)} layers, which change nothing so: {shorten(still, 2)}"
    if file.ignored:
        listed = shorten([f"{key} ({why})" for key, why in file.ignored], 2)
        yield f"{len(file.ignored)} tensors belong to no layer: {listed}"
        if (why := stranger_of(key for key, _ in file.ignored)) is not None:
            yield f"not LoRA as it looks, and not read: {why}"
