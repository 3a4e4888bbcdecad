"""Write a LoRA under other names: the same deltas, layer by layer.

Modules correspond by the rows of canonical weights they mean. Where the other naming has one module
for several of the file's (q, k and v in one), their factors are put together:

    up = | up_q   0     0   |     down = | down_q |       rank 3 r; modules that share their down
         |  0    up_k   0   |            | down_k |       factor share its rank too
         |  0     0    up_v |            | down_v |

and where it has several for one, each gets its rows of the up factor and the whole down factor.
Modules of which the file has only some rows get zeros in the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffquant.convert.lora.match import Placed
from diffquant.convert.lora.modules import Model
from diffquant.convert.lora.pairs import Matrix, read_pair, read_part, scale_of
from diffquant.convert.lora.places import Module
from diffquant.convert.lora.spelling import (
    Spelling,
    keys_of,
    module_prefix,
    modules_for,
    unspeakable,
)
from diffquant.convert.rules import Shape
from diffquant.core.errors import MappingError, UsageError
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec

__all__ = ["Layer", "plan_layers", "rewritten"]


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a source layer's up factor, and where they go in the target's."""

    placed: Placed
    up: tuple[int, int]
    at: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One module of the output: a row of the plan.

    Attributes:
        part: of the model.
        module: as the output names it.
        shares: what it is made of.
        rank: of the factors; None for kinds that are copied.
        scale: in the file; what is not in it goes into the up factor.
        keys: role -> key.
        specs: of every tensor.
    """

    part: str
    module: Module
    shares: tuple[Share, ...]
    rank: int | None
    scale: float
    keys: Mapping[str, str]
    specs: tuple[TensorSpec, ...]


def plan_layers(
    source: TensorSource,
    placed: Sequence[Placed],
    model: Model,
    spelling: Spelling,
    *,
    original: bool = False,
    dtype: str | None = None,
    adapter: str = "",
) -> tuple[Layer, ...]:
    """Plan every layer of the output; reads down factors where several come together.

    Args:
        source: the LoRA.
        placed: its layers that fit.
        model: what it is for.
        spelling: how to write it.
        original: as modules_for takes it.
        dtype: STORAGE name of factors; None keeps what each layer has.
        adapter: PEFT's adapter name.

    Raises:
        UsageError: a layer that the spelling has no names for.
        MappingError: a layer that cannot be cut or joined; with every name.
    """
    names = {one.part for one in placed}
    layers: list[Layer] = []
    refused = []
    for part in (model.parts[name] for name in model.parts if name in names):
        prefix = module_prefix(spelling, model, part, alone=len(names) == 1)
        mine = [one for one in placed if one.part == part.name]
        unnamed = [(one, why) for one in mine if (why := unspeakable(spelling, one.adapter))]
        if unnamed:
            refused += unnamed
            continue
        targets = modules_for(spelling, part, original=original)
        reached: set[str] = set()
        for module, shares in _shares(mine, targets):
            reached.update(share.placed.adapter.name for share in shares)
            keys = keys_of(spelling, prefix, module.name, adapter=adapter)
            layers.append(_layer(source, part.name, module, shares, keys, spelling, dtype))
        lost = [one for one in mine if one.adapter.name not in reached]
        refused += [(one, f"{spelling.title} files have no name for it") for one in lost]
    if refused:
        one, why = refused[0]
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise UsageError(f"--to {spelling.slug}: {one.adapter.name}{more}: {why}")
    return tuple(layers)


def _shares(
    placed: Sequence[Placed], targets: Mapping[str, Module]
) -> Iterator[tuple[Module, tuple[Share, ...]]]:
    """Output modules, in the order of the source's layers, with what each is made of."""
    by_key: dict[tuple[str, bool], list[Module]] = {}
    for module in targets.values():
        for key in dict.fromkeys(piece.key for piece in module.pieces):
            by_key.setdefault((key, module.transposed), []).append(module)
    found: dict[str, list[Share]] = {}
    for one in placed:
        assert one.module is not None
        start = 0
        for piece in one.module.pieces:
            for module in by_key.get((piece.key, one.module.transposed), ()):
                at = 0
                for goal in module.pieces:
                    low, high = max(piece.start, goal.start), min(piece.stop, goal.stop)
                    if goal.key == piece.key and low < high:
                        rows = (start + low - piece.start, start + high - piece.start)
                        share = Share(one, rows, at + low - goal.start)
                        found.setdefault(module.name, []).append(share)
                    at += goal.stop - goal.start
            start += piece.stop - piece.start
    for name, shares in found.items():
        yield targets[name], tuple(_joined(shares))


def _joined(shares: Sequence[Share]) -> Iterator[Share]:
    """Join shares that follow each other on both sides."""
    last: Share | None = None
    for share in shares:
        if last is not None and _follows(share, last):
            last = Share(last.placed, (last.up[0], share.up[1]), last.at)
            continue
        if last is not None:
            yield last
        last = share
    if last is not None:
        yield last


def _follows(share: Share, last: Share) -> bool:
    same = share.placed is last.placed and share.up[0] == last.up[1]
    return same and share.at == last.at + last.up[1] - last.up[0]


def _whole(module: Module, shares: Sequence[Share]) -> bool:
    first = shares[0]
    rows = first.placed.module.shape[0] if first.placed.module else 0
    return len(shares) == 1 and first.up == (0, rows) and module.shape[0] == rows


def _layer(
    source: TensorSource,
    part: str,
    module: Module,
    shares: tuple[Share, ...],
    keys: Mapping[str, str],
    spelling: Spelling,
    dtype: str | None,
) -> Layer:
    first = shares[0].placed.adapter
    plain = all(
        share.placed.adapter.kind == "lora" and share.placed.adapter.parts.keys() <= _PLAIN
        for share in shares
    )
    if not plain:
        if not _whole(module, shares):
            raise MappingError(
                f"{first.name}: {first.label} cannot be cut or joined, and {spelling.title} files "
                f"name its rows otherwise ({module.name}); use a naming that has the same modules",
                keys=(first.name,),
            )
        return _copied(source, part, module, shares, keys, dtype)
    scales = {scale_of(share.placed.adapter) for share in shares}
    groups = _groups(source, shares)
    ranks = {groups[share.placed.adapter.name]: share.placed.adapter.rank or 0 for share in shares}
    rank = sum(ranks.values())
    scale = scales.pop() if spelling.alpha and len(scales) == 1 else 1.0
    held = dtype or source.specs[first.parts["up"]].dtype
    specs = [
        TensorSpec(keys["down"], held, (rank, *module.shape[1:])),
        TensorSpec(keys["up"], held, (module.shape[0], rank, *(1 for _ in module.shape[2:]))),
    ]
    if spelling.alpha:
        specs.append(TensorSpec(keys["alpha"], "F32", ()))
    return Layer(part, module, shares, rank, scale, keys, tuple(specs))


_PLAIN = frozenset({"down", "up", "alpha"})


def _groups(source: TensorSource, shares: Sequence[Share]) -> dict[str, int]:
    """Source layer -> number of its down factor: layers with the same one share it."""
    numbers: dict[bytes, int] = {}
    found: dict[str, int] = {}
    adapters = {share.placed.adapter.name: share.placed.adapter for share in shares}
    if len(adapters) == 1:
        return dict.fromkeys(adapters, 0)
    for adapter in adapters.values():
        spec = source.specs[adapter.parts["down"]]
        digest = hashlib.sha256(f"{spec.dtype}".encode())
        digest.update(source.read(spec.key).data)
        found[adapter.name] = numbers.setdefault(digest.digest(), len(numbers))
    return found


def _copied(
    source: TensorSource,
    part: str,
    module: Module,
    shares: tuple[Share, ...],
    keys: Mapping[str, str],
    dtype: str | None,
) -> Layer:
    adapter = shares[0].placed.adapter
    specs = []
    for role, key in adapter.parts.items():
        spec = source.specs[key]
        shape = _magnitude(spec.shape, module.shape) if role == "magnitude" else spec.shape
        held = dtype if dtype and role not in ("alpha", "on_input") and shape else spec.dtype
        specs.append(TensorSpec(keys[role], held, shape))
    if "alpha" not in adapter.parts and adapter.alpha is not None:
        specs.append(TensorSpec(keys["alpha"], "F32", ()))
    return Layer(part, module, shares, None, scale_of(adapter), keys, tuple(specs))


def _magnitude(shape: Shape, weight: Shape) -> Shape:
    """PEFT writes a vector, a number for each row; lycoris a column.

    Sources: peft 0.21.2, tuners/lora/dora.py; lycoris-lora 4.1.3, modules/locon.py, dora_scale.
    """
    return (shape[0], *(1 for _ in weight[1:])) if len(shape) == 1 else shape


def rewritten(
    source: TensorSource, layers: Sequence[Layer], spelling: Spelling
) -> Iterator[Mapping[str, Matrix | ByteArray]]:
    """Key -> numbers of every layer, one layer in memory at a time."""
    for layer in layers:
        if layer.rank is None:
            yield _copy(source, layer)
            continue
        found: dict[str, Matrix | ByteArray] = dict(_factors(source, layer))
        if spelling.alpha:
            found[layer.keys["alpha"]] = np.array(layer.scale * layer.rank, np.float32)
        yield found


def _factors(source: TensorSource, layer: Layer) -> dict[str, Matrix]:
    assert layer.rank is not None
    shape = layer.module.shape
    up = np.zeros((shape[0], layer.rank), np.float32)
    down = np.zeros((layer.rank, math.prod(shape[1:])), np.float32)
    groups = _groups(source, layer.shares)
    starts: dict[int, int] = {}
    used = 0
    for share in layer.shares:
        adapter = share.placed.adapter
        pair = read_pair(source, adapter)
        rank = len(pair.down)
        number = groups[adapter.name]
        if number not in starts:
            starts[number] = used
            down[used : used + rank] = pair.down
            used += rank
        begin = starts[number]
        part = pair.up[share.up[0] : share.up[1]]
        factor = pair.scale / layer.scale if layer.scale else 1.0  # alpha 0: nothing, as it was
        up[share.at : share.at + len(part), begin : begin + rank] = part * np.float32(factor)
    return {layer.keys["down"]: down, layer.keys["up"]: up}


def _copy(source: TensorSource, layer: Layer) -> dict[str, Matrix | ByteArray]:
    """Parts as they are; cast where the plan says so."""
    adapter = layer.shares[0].placed.adapter
    specs = {spec.key: spec for spec in layer.specs}
    found: dict[str, Matrix | ByteArray] = {}
    for role, key in adapter.parts.items():
        same = specs[layer.keys[role]].dtype == source.specs[key].dtype
        found[layer.keys[role]] = source.read(key) if same else read_part(source, adapter, role)
    alpha = layer.keys.get("alpha", "")
    if "alpha" not in adapter.parts and alpha in specs:
        found[alpha] = np.array(layer.scale * (adapter.rank or 1), np.float32)
    return found
