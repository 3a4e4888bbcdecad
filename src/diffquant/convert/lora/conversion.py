"""convert_lora(): a LoRA file under another naming, written and accounted for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.lora.match import Placed, match_adapters
from diffquant.convert.lora.modules import Model
from diffquant.convert.lora.pairs import scale_of, write
from diffquant.convert.lora.peft_config import WEIGHTS_FILE, PeftPart, config_file, config_pair
from diffquant.convert.lora.peft_folder import check_folder, is_folder, new_folder, put_config
from diffquant.convert.lora.rewrite import Layer, plan_layers, rewritten
from diffquant.convert.lora.spelling import SPELLINGS, Spelling
from diffquant.convert.lora.workshop import (
    OpenLora,
    base_model,
    check_apart,
    check_output,
    header_of,
    open_lora,
)
from diffquant.convert.lora.written import lora_header
from diffquant.core.errors import ArchitectureError, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress

__all__ = ["ConversionReport", "convert_lora"]

_STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        source, output: paths.
        base: architecture the names are those of.
        naming: of the source, for people.
        to: SPELLINGS name of the output.
        layers: of the source.
        written: modules of the output.
        split: source layers that became several modules.
        joined: output modules made of several layers.
        ranks: rank -> modules of the output; "" -> those without one.
        left_out: (tensor or layer, reason) of what has no place in the output.
        nbytes: of all tensors.
        dry_run: nothing was written.
        notes: sentences for people.
    """

    source: str
    output: str
    base: str
    naming: str
    to: str
    layers: int
    written: int
    split: int
    joined: int
    ranks: Mapping[str, int]
    left_out: tuple[tuple[str, str], ...]
    nbytes: int
    dry_run: bool
    notes: tuple[str, ...]


def convert_lora(
    src: Path,
    out: Path,
    *,
    to: str,
    dtype: str | None = None,
    base: Path | None = None,
    original: bool = False,
    adapter: str = "",
    allow_missing: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> ConversionReport:
    """Write a LoRA's deltas under another naming.

    Args:
        src: a LoRA or kin in any naming.
        out: a safetensors file; or, to PEFT, a folder as PEFT saves one.
        to: SPELLINGS name.
        dtype: f32, f16 or bf16 for the factors; None keeps what they have.
        base: checkpoint it is for, where no known model has its widths.
        original: name a UNet's modules in kohya files as its makers do.
        adapter: PEFT's name of the adapter in the keys.
        allow_missing: leave out layers that the model does not have.
        force: replace an existing output.
        dry_run: write nothing.
        progress: told about bytes.

    Raises:
        DiffquantError: see core/errors.py; nothing is left behind.
    """
    spelling = SPELLINGS[to]
    if adapter and spelling.alpha:
        raise UsageError(f"--adapter-name: {spelling.title} files name no adapters")
    inputs = [src, *([base] if base else [])]
    folder = to == "peft" and is_folder(out)
    if folder:
        check_apart(out, inputs)
        check_folder(out, force=force or dry_run)
    else:
        check_output(out, inputs, force=force or dry_run)
    with open_lora(src) as lora:
        model = base_model(lora, base)
        match = match_adapters(lora.adapters, model)
        fitting = match.fitting
        lost = [one for one in match.placed if one.verdict != "matched"]
        _refuse_lost(src, lost, model, allow_missing=allow_missing)
        groups = [fitting]
        if folder:
            groups = [tuple(one for one in fitting if one.part == part) for part in model.parts]
        planned = [
            plan_layers(
                lora.source,
                group,
                model,
                spelling,
                original=original,
                dtype=_STORED[dtype] if dtype else None,
                adapter=adapter,
            )
            for group in groups
            if group
        ]
        layers = tuple(layer for some in planned for layer in some)
        specs = [spec for layer in layers for spec in layer.specs]
        if not spelling.alpha:
            _peft_parts(model, layers)  # refused before anything is written
        if not dry_run:
            if folder:
                with new_folder(out) as building:
                    _write_parts(building, lora, model, planned, spelling, progress)
            else:
                _write(out, lora, model, layers, spelling, out.stem, progress, force=force)
        return ConversionReport(
            source=str(src),
            output=str(out),
            base=" ".join(filter(None, (model.architecture, model.variant))),
            naming=lora.file.naming.title,
            to=to,
            layers=len(lora.adapters),
            written=len(layers),
            split=_split(layers),
            joined=sum(len({s.placed.adapter.name for s in one.shares}) > 1 for one in layers),
            ranks=_counted(layers),
            left_out=(
                *((one.adapter.name, one.reason) for one in lost),
                *lora.file.ignored,
                *((key, "a token's vectors: a file of their own") for key in lora.file.vectors),
            ),
            nbytes=sum(spec.nbytes for spec in specs),
            dry_run=dry_run,
            notes=tuple(_notes(fitting, layers, spelling)),
        )


def _write(
    out: Path,
    lora: OpenLora,
    model: Model,
    layers: Sequence[Layer],
    spelling: Spelling,
    title: str,
    progress: Progress,
    *,
    force: bool = False,
) -> None:
    specs = [spec for layer in layers for spec in layer.specs]
    numbers = rewritten(lora.source, layers, spelling)
    header = _header(lora, model, layers, spelling, title)
    write(out, specs, numbers, header, force=force, progress=progress)


def _write_parts(
    folder: Path,
    lora: OpenLora,
    model: Model,
    planned: Sequence[Sequence[Layer]],
    spelling: Spelling,
    progress: Progress,
) -> None:
    """Weights and configuration of each part as PEFT saves them."""
    for layers in planned:
        [[name, part]] = _peft_parts(model, layers).items()
        target = folder / name if len(planned) > 1 else folder
        target.mkdir(exist_ok=True)
        _write(target / WEIGHTS_FILE, lora, model, layers, spelling, name, progress)
        put_config(target, config_file(part))


def _peft_parts(model: Model, layers: Sequence[Layer]) -> dict[str, PeftPart]:
    """Diffusers' folder -> what is written for that part."""
    ranks: dict[str, dict[str, int]] = {}
    dora: dict[str, list[bool]] = {}
    for layer in layers:
        ranks.setdefault(layer.part, {})[layer.module.name] = layer.rank or 0
        keys = {spec.key for spec in layer.specs}
        dora.setdefault(layer.part, []).append(layer.keys.get("magnitude") in keys)
    for name, marks in dora.items():
        if any(marks) and not all(marks):
            raise UsageError(
                f"--to peft, diffusers: {marks.count(True)} of {len(marks)} layers for {name} are "
                "DoRA, and PEFT has it for all or none; --to kohya has it for each"
            )
    return {
        model.parts[name].folder: PeftPart(ranks[name], model.parts[name].diffusers, all(marks))
        for name, marks in dora.items()
    }


def _refuse_lost(src: Path, lost: Sequence[Placed], model: Model, *, allow_missing: bool) -> None:
    if not lost or allow_missing:
        return
    wide = all(one.verdict == "shape_mismatch" for one in lost) and model.known
    advice = "give the model with --base" if wide else "--allow-missing leaves them out"
    named = shorten([f"{one.adapter.name} ({one.reason})" for one in lost], 2)
    raise ArchitectureError(
        f"{src}: {len(lost)} layers are not those of {model.architecture}: {named}; {advice}"
    )


def _header(
    lora: OpenLora, model: Model, layers: Sequence[Layer], spelling: Spelling, title: str
) -> dict[str, str]:
    ranks = [layer.rank for layer in layers if layer.rank]
    found = header_of(lora.source, ranks)
    if spelling.slug == "kohya":
        return {
            **lora_header(model.architecture, model.variant, title, ranks[0] if ranks else 0),
            **found,
        }
    if spelling.alpha or not ranks:
        return found
    parts = _peft_parts(model, layers)
    alone = spelling.slug != "diffusers" and len(parts) == 1
    return {**found, **config_pair(parts, alone=alone)}


def _split(layers: Sequence[Layer]) -> int:
    counts = Counter(name for one in layers for name in {s.placed.adapter.name for s in one.shares})
    return sum(count > 1 for count in counts.values())


def _counted(layers: Sequence[Layer]) -> dict[str, int]:
    counts = Counter("" if one.rank is None else str(one.rank) for one in layers)
    return dict(counts.most_common())


def _notes(placed: Sequence[Placed], layers: Sequence[Layer], spelling: Spelling) -> list[str]:
    notes = []
    scales = {scale_of(one.adapter) for one in placed if one.adapter.rank}
    if not spelling.alpha and scales - {1.0}:
        listed = ", ".join(f"{one:g}" for one in sorted(scales)[:4])
        rounded = (
            ""
            if all(_is_power(one) for one in scales)
            else "; it rounds them: --dtype f32 does not"
        )
        notes.append(f"the scale (alpha / rank: {listed}) goes into the up factors{rounded}")
    if grown := [one for one in layers if one.rank and len(one.shares) > 1 and _grew(one)]:
        most = max(one.rank or 0 for one in grown)
        notes.append(
            f"{len(grown)} modules join layers with different down factors: rank up to {most}"
        )
    if spelling.slug == "peft" and any("text_model." in one.module.name for one in layers):
        notes.append(
            "CLIP's modules have transformers 4's names (text_model.), which its own class has no "
            "more in transformers 5; Diffusers reads both: --to diffusers"
        )
    if spelling.slug == "bfl":
        notes.append("Diffusers reads this naming only where the file has every layer of the model")
    return notes


def _is_power(scale: float) -> bool:
    """Whether a multiplication by it is exact in every floating point format."""
    return scale > 0 and math.frexp(scale)[0] == 0.5


def _grew(layer: Layer) -> bool:
    return (layer.rank or 0) > max(share.placed.adapter.rank or 0 for share in layer.shares)
