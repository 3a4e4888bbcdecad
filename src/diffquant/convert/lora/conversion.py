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
from diffquant.convert.lora.rewrite import Layer, plan_layers, rewritten
from diffquant.convert.lora.spelling import SPELLINGS, Spelling
from diffquant.convert.lora.workshop import (
    OpenLora,
    base_model,
    check_output,
    header_of,
    open_lora,
    peft_config_of,
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
        out: a safetensors file.
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
    check_output(out, [src, *([base] if base else [])], force=force or dry_run)
    with open_lora(src) as lora:
        model = base_model(lora, base)
        match = match_adapters(lora.adapters, model)
        fitting = match.fitting
        lost = [one for one in match.placed if one.verdict != "matched"]
        _refuse_lost(src, lost, model, allow_missing=allow_missing)
        layers = plan_layers(
            lora.source,
            fitting,
            model,
            spelling,
            original=original,
            dtype=_STORED[dtype] if dtype else None,
            adapter=adapter,
        )
        specs = [spec for layer in layers for spec in layer.specs]
        if not dry_run:
            header = _header(lora, model, layers, spelling, out.stem)
            write(
                out,
                specs,
                rewritten(lora.source, layers, spelling),
                header,
                force=force,
                progress=progress,
            )
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
    by_folder: dict[str, dict[str, int]] = {}
    for layer in layers:
        folder = model.parts[layer.part].folder
        by_folder.setdefault(folder, {})[layer.module.name] = layer.rank or 0
    alone = spelling.slug != "diffusers" and len(by_folder) == 1
    return {**found, **peft_config_of(by_folder, alone=alone)}


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
    if spelling.slug == "bfl":
        notes.append("Diffusers reads this naming only where the file has every layer of the model")
    return notes


def _is_power(scale: float) -> bool:
    """Whether a multiplication by it is exact in every floating point format."""
    return scale > 0 and math.frexp(scale)[0] == 0.5


def _grew(layer: Layer) -> bool:
    return (layer.rank or 0) > max(share.placed.adapter.rank or 0 for share in layer.shares)
