"""LoRAs beside the packed weights of an opened model: read, matched, attached; nothing is merged.

All files are read and checked before the first adapter is attached, so a refused file leaves the
model as it was. A LoRA made for another family is an error, one that fits in part is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.match import LoraMatch, LoraTarget, looks_like, match_lora
from diffquant.convert.lora.parse import LoraFile, LoraLayer, factors, parse_lora
from diffquant.core.errors import ArchitectureError, shorten
from diffquant.io import open_source
from diffquant.runtime.layers import LowRank, PackedLayer, QuantEmbedding
from diffquant.runtime.lora_reach import View, view_of
from diffquant.runtime.opening import Opened

__all__ = ["LoraUse", "attach"]

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoraUse:
    """What became of one LoRA.

    Attributes:
        path: the file.
        weight: strength it was attached with.
        matched: layers attached.
        unmatched: (name in the file, reason) of layers that were not.
        rank: the largest rank.
        alpha_stated: the file states alpha for every layer; else alpha is taken to be the rank.
        warnings: sentences for people.
    """

    path: str
    weight: float
    matched: int
    unmatched: tuple[tuple[str, str], ...]
    rank: int
    alpha_stated: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    use: LoraUse
    adapters: tuple[tuple[PackedLayer, LowRank], ...]


def attach(opened: Opened, loras: tuple[tuple[Path, float], ...]) -> tuple[LoraUse, ...]:
    """Attach LoRAs to an opened model, all or none of them.

    Args:
        opened: its modules are changed.
        loras: (file, weight); deltas add up in any order.

    Raises:
        ArchitectureError: no LoRA, a kind that is not supported, or one made for another family.
        CheckpointError: a file that cannot be read.
    """
    if not loras:
        return ()
    views = _views(opened)
    prepared = [_prepare(opened.architecture, views, path, weight) for path, weight in loras]
    for one in prepared:
        for layer, adapter in one.adapters:
            layer.adapters.append(adapter)
    return tuple(one.use for one in prepared)


def _modules(opened: Opened) -> dict[str, nn.Module]:
    """Part name -> module, for the parts a LoRA can reach."""
    parts = opened.pipeline.parts
    names = [one.name for one in ARCHITECTURES[opened.architecture].components]
    encoders = [name for name in names if name.startswith("text_encoder")]
    return {"denoiser": parts.denoiser, **dict(zip(encoders, parts.text_encoders, strict=True))}


def _views(opened: Opened) -> dict[str, View]:
    """Part name -> its module by canonical names."""
    architecture = ARCHITECTURES[opened.architecture]
    return {
        name: view_of(module, architecture.component(name))
        for name, module in _modules(opened).items()
    }


def _prepare(architecture: str, views: Mapping[str, View], path: Path, weight: float) -> _Prepared:
    parts = {name: view.shapes for name, view in views.items()}
    with open_source(path) as source:
        file = parse_lora(source)
        match = match_lora(file.layers, ARCHITECTURES[architecture], parts)
        unreached = {
            target.layer.name: why
            for target in match.targets
            for reached in views[target.part].reach(target.key, target.rows)
            if (why := _unreached(reached.layer))
        }
        unmatched = (
            *match.unmatched,
            *match.shape_mismatch,
            *sorted(unreached.items()),
        )
        _check_family(path, architecture, file, match)
        targets = [target for target in match.targets if target.layer.name not in unreached]
        adapters, silent = [], True
        for layer, adapter in _adapters(bind(source), targets, views, weight):
            adapters.append((layer, adapter.to(layer.device)))
            silent = silent and not bool(adapter.up.any())
    matched = match.matched - len(unreached)
    warnings = list(_warnings(path, file, matched, unmatched))
    if silent:
        warnings.append(f"{path.name}: every up factor is zero, so the LoRA changes nothing")
    use = LoraUse(
        path=str(path),
        weight=weight,
        matched=matched,
        unmatched=unmatched,
        rank=max(layer.rank for layer in file.layers),
        alpha_stated=all(layer.alpha is not None for layer in file.layers),
        warnings=tuple(warnings),
    )
    return _Prepared(use, tuple(adapters))


def _unreached(layer: PackedLayer | None) -> str:
    """Why no LoRA can lie beside a layer; empty where one can."""
    if layer is None:
        return "a bare parameter takes no LoRA here; lora merge does it"
    is_table = isinstance(layer, QuantEmbedding)
    return "a table of embeddings takes no LoRA yet" if is_table else ""


def _adapters(
    source: LogicalSource, targets: list[LoraTarget], views: Mapping[str, View], weight: float
) -> Iterator[tuple[PackedLayer, LowRank]]:
    """Read the factors of each layer once, in the precision the file stores."""
    last: LoraLayer | None = None
    for target in targets:
        if target.layer is not last:
            last = target.layer
            arrays = factors(source, last)
            keys = (last.down, last.up)
            down, up = (
                torch.from_numpy(array).to(_STORED.get(source.tensors[key].dtype, torch.float32))
                for array, key in zip(arrays, keys, strict=True)
            )
        view, scale = views[target.part], weight * last.scale
        chosen = up[slice(*target.up_rows) if target.up_rows else slice(None)]
        for reached in view.reach(target.key, target.rows):
            assert reached.layer is not None, "bare parameters were left out"
            if view.transposed(target.key) != target.transposed:  # (up down)^T = down^T up^T
                yield reached.layer, LowRank(chosen.T, down.T, scale)
                continue
            rows = slice(None) if target.transposed else slice(reached.start, reached.stop)
            yield reached.layer, LowRank(down, chosen[rows], scale, reached.rows)


def _check_family(path: Path, architecture: str, file: LoraFile, match: LoraMatch) -> None:
    """Refuse a LoRA for another family: most layers of the denoiser do not fit, or shapes tell."""
    reached = {target.layer.name for target in match.targets}
    counted = [one for one in file.layers if one.part in ("", "denoiser")] or list(file.layers)
    fitting = sum(one.name in reached for one in counted)
    guess = looks_like(file.layers)
    foreign = bool(guess) and architecture not in guess
    if 2 * fitting >= len(counted) and not (foreign and match.shape_mismatch):
        return
    how_many = f"only {fitting} of {len(counted)}" if fitting else "none"
    named = f"it looks like {guess[0]}, " if foreign else ""
    name, why = next(iter((*match.shape_mismatch, *match.unmatched)))
    raise ArchitectureError(
        f"{path}: this LoRA fits {how_many} of the model's layers: {named}the model is "
        f"{architecture} ({name}: {why})"
    )


def _warnings(
    path: Path, file: LoraFile, matched: int, unmatched: tuple[tuple[str, str], ...]
) -> Iterator[str]:
    if unmatched:
        examples = shorten([f"{name} ({why})" for name, why in unmatched], 2)
        total = len(file.layers)
        yield f"{path.name}: {total - matched} of {total} layers are not used: {examples}"
    if file.ignored:
        examples = shorten([f"{key} ({why})" for key, why in file.ignored], 2)
        yield f"{path.name}: {len(file.ignored)} tensors are not used: {examples}"
