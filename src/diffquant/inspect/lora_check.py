"""LoraCheck: whether a LoRA fits a model, layer by layer, and what to do where it does not.

Without a model, the published one that the LoRA seems made for stands in. From headers; `strength`
reads the LoRA's values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.lora.base import UNKNOWN, BaseGuess, guess_base
from diffquant.convert.lora.claims import claims_of
from diffquant.convert.lora.distilled import distilled_of
from diffquant.convert.lora.group import AdapterFile, group_adapters
from diffquant.convert.lora.match import Placed, Verdict, match_adapters, obstacle
from diffquant.convert.lora.modules import Model, known_model, model_of
from diffquant.convert.lora.strength import delta_norm
from diffquant.core.errors import ArchitectureError, MalformedFile, UnknownArchitecture
from diffquant.inspect.subject import Subject

__all__ = ["BlockStrength", "LayerCheck", "LoraCheck", "PartCheck", "check_lora"]

_NUMBER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")
_FEW = 8  # blocks below which a LoRA of the first ones may be meant so
# Namings that some programs only read -> which. Comfy-Org/ComfyUI@17358c8:comfy/lora.py,
# lora_convert.py; diffusers 0.42.1 (package), loaders/lora_pipeline.py, lora_conversion_utils.py
_READERS: Mapping[str, str] = {
    "cloneofsimo": "no program in use, modules go by number",
    "xlabs": "Diffusers",
    "uso": "ComfyUI",
    "fal_kontext": "Diffusers",
    "diffusers_old": "Diffusers and ComfyUI",
    "simpletuner": "ComfyUI",
}


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer: its name in the file, the part and module it means, and whether it fits."""

    name: str
    part: str
    module: str
    verdict: Verdict
    reason: str
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class PartCheck:
    """How many of a part's layers in the file fit; `blocks` as "double_blocks 19 of 19"."""

    name: str
    layers: int
    matched: int
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockStrength:
    """Size of the change of a block: the root of the sum of squares over its layers."""

    block: str
    layers: int
    norm: float


@dataclass(frozen=True, slots=True)
class LoraCheck:
    """Whether a LoRA fits a model.

    Attributes:
        lora, base: paths; base is "" where a published model stands in.
        made_for: architecture the LoRA's layers are those of, or "unknown".
        model: architecture and variant it is held against.
        verdict: "applies", "partly" or "nothing".
        summary: one sentence.
        remedies: what to do.
        matched, unmatched, shape_mismatch: numbers of layers.
        parts: of the file.
        layers: every layer.
        strengths: by block, in the model's order; empty unless asked for.
        unmeasured: layers whose size cannot be told without the weight.
        notes: what a user should know besides.
    """

    lora: str
    base: str
    made_for: str
    model: str
    verdict: str
    summary: str
    remedies: tuple[str, ...]
    matched: int
    unmatched: int
    shape_mismatch: int
    parts: tuple[PartCheck, ...]
    layers: tuple[LayerCheck, ...]
    strengths: tuple[BlockStrength, ...]
    unmeasured: int
    notes: tuple[str, ...]


def check_lora(lora: Subject, base: Subject | None = None, *, strength: bool = False) -> LoraCheck:
    """Hold a LoRA against a model.

    Args:
        lora: the opened adapter file.
        base: the opened model; None: the published one it seems made for.
        strength: measure every layer's change.

    Raises:
        ArchitectureError: no LoRA in the first file, no model in the second, or no base given for
            a LoRA that fits no known one.
        MalformedFile: a layer whose tensors contradict each other or lack a half.
    """
    file = _adapters(lora)
    claimed = [slug for claim in claims_of(lora.source.metadata) for slug in claim.architectures]
    guess = guess_base(file.adapters, claimed)
    model = _model(lora, base, guess)
    placed = match_adapters(file.adapters, model).placed
    norms = {one.name: delta_norm(lora.source, one) for one in file.adapters} if strength else {}
    matched = sum(one.verdict == "matched" for one in placed)
    parts = tuple(_parts(placed, model))
    foreign = _is_foreign(guess, model)
    verdict = "applies" if matched == len(placed) else "partly" if matched else "nothing"
    if foreign and 2 * matched < len(placed):
        verdict = "nothing"
    return LoraCheck(
        lora=lora.path,
        base=base.path if base is not None else "",
        made_for=" ".join(filter(None, (guess.architecture, guess.variant))),
        model=" ".join(filter(None, (model.architecture, model.variant))),
        verdict=verdict,
        summary=_summary(verdict, matched, len(placed), guess, model, foreign=foreign),
        remedies=tuple(_remedies(file, placed, guess, model, parts, foreign=foreign)),
        matched=matched,
        unmatched=sum(one.verdict == "unmatched" for one in placed),
        shape_mismatch=sum(one.verdict == "shape_mismatch" for one in placed),
        parts=parts,
        layers=tuple(
            LayerCheck(
                one.adapter.name,
                one.part,
                one.module.name if one.module else "",
                one.verdict,
                one.reason,
                norms.get(one.adapter.name),
            )
            for one in placed
        ),
        strengths=tuple(_strengths(placed, model, norms)),
        unmeasured=sum(value is None for value in norms.values()),
        notes=(*_unmergeable(placed), *_shorter(placed, model), *_notes(lora, base, guess, file)),
    )


def _adapters(lora: Subject) -> AdapterFile:
    file = group_adapters(lora.source)
    if file is None or not (file.adapters or file.broken):
        first = next(iter(lora.source.specs), "no tensors")
        raise ArchitectureError(f"{lora.path}: no LoRA in it (first tensor: {first})")
    if file.broken:
        one = file.broken[0]
        more = f" and {len(file.broken) - 1} more" if len(file.broken) > 1 else ""
        raise MalformedFile(f"{one.name}: {one.reason}{more}", path=lora.path)
    return file


def _model(lora: Subject, base: Subject | None, guess: BaseGuess) -> Model:
    if base is not None:
        if base.match is None:
            raise UnknownArchitecture(
                f"{base.path}: this is no model that is known here ({base.kind})"
            )
        return model_of(base.match)
    model = known_model(guess)
    if model is None:
        raise ArchitectureError(
            f"{lora.path}: no known model has these layers; give the model: lora check LORA BASE"
        )
    return model


def _is_foreign(guess: BaseGuess, model: Model) -> bool:
    """Whether the LoRA's layers are known to be another architecture's."""
    known = guess.architecture != UNKNOWN
    return known and model.architecture not in (guess.architecture, *guess.also)


def _summary(
    verdict: str, matched: int, total: int, guess: BaseGuess, model: Model, *, foreign: bool
) -> str:
    if foreign and verdict == "nothing":
        return (
            f"made for {guess.architecture}, the model is {model.architecture}: nothing can load "
            "it there"
        )
    if verdict == "applies":
        return f"all {total} layers fit"
    if verdict == "nothing":
        return f"none of {total} layers fits"
    return f"{matched} of {total} layers fit, {total - matched} would be lost"


def _remedies(
    file: AdapterFile,
    placed: Sequence[Placed],
    guess: BaseGuess,
    model: Model,
    parts: Sequence[PartCheck],
    *,
    foreign: bool,
) -> Iterator[str]:
    if foreign:
        yield f"use it with {guess.architecture}"
    wide = [one for one in placed if one.verdict == "shape_mismatch"]
    if wide and not foreign:
        if model.known:
            yield (
                f"it is for a {model.architecture} of other widths than the published one: give "
                "the model: lora check LORA BASE"
            )
        else:
            member = f" {guess.variant}" if guess.variant else ""
            yield (
                f"the widths are another member's of the family: it was made for "
                f"{guess.architecture}{member}, the model is {model.architecture} {model.variant}"
            )
    for part in parts:
        if part.name.startswith("text_encoder") and part.name not in model.parts:
            yield (
                f"{part.layers} layers are for {part.name}, which this file does not hold: check "
                "against the whole checkpoint, or load the encoder's layers where it is"
            )
    gone = [
        one
        for one in placed
        if one.verdict == "unmatched" and one.part in model.parts and not foreign
    ]
    if gone:
        yield (
            f"{len(gone)} layers are of blocks or modules that the model lacks: it was trained on "
            "a larger or another member of the family"
        )
    if (readers := _READERS.get(file.naming.slug)) and not foreign:
        yield (
            f"names are {file.naming.title}, read by {readers}: `lora convert --to kohya` for "
            "everybody else"
        )
    elif file.naming.slug in ("diffusers", "peft") and _has_unet(model) and not foreign:
        yield ("ComfyUI does not read these names of a UNet's attention; `lora convert --to kohya`")


def _has_unet(model: Model) -> bool:
    part = model.parts.get("denoiser")
    return part is not None and part.kind.startswith("unet")


def _parts(placed: Sequence[Placed], model: Model) -> Iterator[PartCheck]:
    for name in dict.fromkeys(one.part for one in placed):
        mine = [one for one in placed if one.part == name]
        fit = [one for one in mine if one.verdict == "matched"]
        yield PartCheck(name, len(mine), len(fit), tuple(_blocks(fit, model, name)))


def _blocks(placed: Sequence[Placed], model: Model, part: str) -> Iterator[str]:
    """How many blocks of each stack are touched, by the model's own names."""
    for stack, (touched, whole) in _stacks(placed, model, part).items():
        yield f"{stack} {len(touched)} of {len(whole)}"


def _stacks(
    placed: Sequence[Placed], model: Model, part: str
) -> dict[str, tuple[set[int], set[int]]]:
    """Stack -> numbers of the blocks that are touched, and of those there are."""
    found: dict[str, tuple[set[int], set[int]]] = {}
    for one in placed:
        if number := _NUMBER.match(_key(one)):
            found.setdefault(number[1], (set(), set()))[0].add(int(number[2]))
    for name in model.parts[part].own if part in model.parts else ():
        if (number := _NUMBER.match(name)) and number[1] in found:
            found[number[1]][1].add(int(number[2]))
    return found


def _shorter(placed: Sequence[Placed], model: Model) -> Iterator[str]:
    """Stacks whose first blocks are touched, every one of them, and none of the rest."""
    mine = [one for one in placed if one.part == "denoiser" and one.verdict == "matched"]
    for stack, (touched, whole) in _stacks(mine, model, "denoiser").items():
        count = len(touched)
        if _FEW <= count < len(whole) and touched == set(range(count)):
            yield (
                f"it touches the first {count} of {len(whole)} blocks of {stack} and no other: "
                "trained on a smaller member of the family, or on these alone"
            )


def _unmergeable(placed: Sequence[Placed]) -> Iterator[str]:
    """What fits, and yet `lora merge` refuses: the reason once, with how many."""
    counts = Counter(why for one in placed if one.verdict == "matched" and (why := obstacle(one)))
    for why, count in counts.items():
        yield f"{count} layers fit but cannot be merged: {why}"


def _key(placed: Placed) -> str:
    return placed.module.pieces[0].key if placed.module and placed.module.pieces else ""


def _strengths(
    placed: Sequence[Placed], model: Model, norms: Mapping[str, float | None]
) -> Iterator[BlockStrength]:
    sums: dict[str, list[float]] = {}
    for one in placed:
        norm = norms.get(one.adapter.name)
        if norm is not None and one.verdict == "matched":
            found = _NUMBER.match(_key(one))
            block = f"{found[1]}.{found[2]}" if found else _key(one).removesuffix(".weight")
            name = block if one.part == "denoiser" else f"{one.part} {block}"
            sums.setdefault(name, []).append(norm)
    order = {name: at for at, name in enumerate(_order(model))}
    for block in sorted(sums, key=lambda name: order.get(name, len(order))):
        squares = sum(norm * norm for norm in sums[block])
        yield BlockStrength(block, len(sums[block]), squares**0.5)


def _order(model: Model) -> Iterator[str]:
    for part in model.parts.values():
        before = "" if part.name == "denoiser" else f"{part.name} "
        blocks = {(m[1], int(m[2])) for name in part.own if (m := _NUMBER.match(name))}
        stacks = list(dict.fromkeys(m[1] for name in part.own if (m := _NUMBER.match(name))))
        for stack, number in sorted(blocks, key=lambda one: (stacks.index(one[0]), one[1])):
            yield f"{before}{stack}.{number}"


def _notes(
    lora: Subject, base: Subject | None, guess: BaseGuess, file: AdapterFile
) -> Iterator[str]:
    if base is None:
        yield "no model was given: the published one stands in"
    else:
        packed = sum(one.is_quantized for one in base.logical.tensors.values())
        if packed:
            yield (
                f"{packed} weights of the model are packed: `generate --lora` lays the LoRA beside "
                "them, merging rounds them again"
            )
    if row := distilled_of([Path(lora.path).stem], guess.architecture):
        yield f"its name says {row.title}: {row.advice} ({row.source})"
    still = [one.name for one in file.adapters if one.alpha == 0 and one.rank]
    if still:
        yield f"alpha is 0 in {len(still)} layers, which change nothing so"
