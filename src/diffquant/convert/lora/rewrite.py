"""Write a LoRA under other names: the same deltas, layer by layer.

Modules correspond by the rows of canonical weights they mean. Where the other naming has one module
for several of the file's (q, k and v in one), their factors are put together:

    up = | up_q   0     0   |     down = | down_q |       rank 3 r; modules that share their down
         |  0    up_k   0   |            | down_k |       factor share its rank too
         |  0     0    up_v |            | down_v |

and where it has several for one, each gets its rows of the up factor and the whole down factor.
Modules of which the file has only some rows get zeros in the others. What other kinds have for each
row is told by rowwise.py; what cannot be cut or joined is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffquant.convert.lora.deltas.magnitude import is_by_columns
from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.match import Placed
from diffquant.convert.lora.modules import Model
from diffquant.convert.lora.pairs import Matrix, read_pair, read_part, scale_of
from diffquant.convert.lora.places import Module
from diffquant.convert.lora.rowwise import Run, Unit, cut_refusal, row_parts
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

    @property
    def run(self) -> Run:
        """The same without the place."""
        return Run(self.placed.adapter, *self.up, self.at)


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
    adapters = [share.placed.adapter for share in shares]
    if all(_has_factors(one) for one in adapters):
        return _of_factors(source, part, module, shares, keys, spelling, dtype)
    if not _whole(module, shares):
        runs = [share.run for share in shares]
        if why := cut_refusal(source, runs, module.shape[0]):
            raise MappingError(
                f"{adapters[0].name}: {spelling.title} files name its rows otherwise "
                f"({module.name}): {why}",
                keys=tuple(one.name for one in adapters),
            )
    return _of_parts(source, part, module, shares, keys, dtype)


def _has_factors(adapter: Adapter) -> bool:
    """Whether an adapter is two factors with at most what belongs to single rows."""
    if adapter.kind != "lora" or adapter.parts.keys() - _FACTORS:
        return False
    return "magnitude" not in adapter.parts or not is_by_columns(adapter)


_FACTORS = frozenset({"down", "up", "alpha", "magnitude", "diff_b"})
_ROWS = ("magnitude", "diff_b")


def _of_factors(
    source: TensorSource,
    part: str,
    module: Module,
    shares: tuple[Share, ...],
    keys: Mapping[str, str],
    spelling: Spelling,
    dtype: str | None,
) -> Layer:
    """Factors are joined and cut, and with them a magnitude and a bias of each row."""
    adapters = [share.placed.adapter for share in shares]
    first = adapters[0]
    dora = [one for one in adapters if "magnitude" in one.parts]
    covered = sum(share.up[1] - share.up[0] for share in shares)
    if dora and (len(dora) < len(adapters) or covered < module.shape[0]):
        why = "a magnitude is needed for every row of it, and the file has some"
        raise MappingError(
            f"{dora[0].name}: DoRA cannot be joined into {module.name}: {why}; merge it into the "
            "checkpoint instead (lora merge)",
            keys=tuple(one.name for one in adapters),
        )
    scales = {scale_of(one) for one in adapters}
    groups = _groups(source, shares)
    ranks = {groups[one.name]: one.rank or 0 for one in adapters}
    rank = sum(ranks.values())
    scale = scales.pop() if spelling.alpha and len(scales) == 1 else 1.0
    held = dtype or source.specs[first.parts["up"]].dtype
    tail = tuple(1 for _ in module.shape[2:])
    specs = [
        TensorSpec(keys["down"], held, (rank, *module.shape[1:])),
        TensorSpec(keys["up"], held, (module.shape[0], rank, *tail)),
    ]
    if dora:
        specs.append(TensorSpec(keys["magnitude"], held, spelling.magnitude(module.shape)))
    if any("diff_b" in one.parts for one in adapters):
        specs.append(TensorSpec(keys["diff_b"], held, (module.shape[0],)))
    if spelling.alpha:
        specs.append(TensorSpec(keys["alpha"], "F32", ()))
    return Layer(part, module, shares, rank, scale, keys, tuple(specs))


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


def _of_parts(
    source: TensorSource,
    part: str,
    module: Module,
    shares: tuple[Share, ...],
    keys: Mapping[str, str],
    dtype: str | None,
) -> Layer:
    """Parts as they are, but for those that have rows: of these, the module's own."""
    adapter = shares[0].placed.adapter
    units = {} if _whole(module, shares) else row_parts(adapter)
    specs = []
    for role, key in adapter.parts.items():
        spec = source.specs[key]
        shape = _lycoris_magnitude(spec.shape, module.shape) if role == "magnitude" else spec.shape
        if role in units and role != "magnitude":
            shape = _resized(shape, units[role], module.shape[0])
        held = dtype if dtype and role not in ("alpha", "on_input") and shape else spec.dtype
        specs.append(TensorSpec(keys[role], held, shape))
    if "alpha" not in adapter.parts and adapter.alpha is not None:
        specs.append(TensorSpec(keys["alpha"], "F32", ()))
    return Layer(part, module, shares, None, scale_of(adapter), keys, tuple(specs))


def _resized(shape: Shape, unit: Unit, rows: int) -> Shape:
    return (*shape[: unit.axis], rows // unit.size, *shape[unit.axis + 1 :])


def _lycoris_magnitude(shape: Shape, weight: Shape) -> Shape:
    """PEFT writes a vector, a number for each row, or (1, N, 1, 1); lycoris a column.

    Sources: peft 0.21.2, tuners/lora/dora.py; lycoris-lora 4.1.3, modules/locon.py, dora_scale.
    """
    rows = weight[0]
    by_rows = len(shape) == 1 or (shape[0] == 1 and shape[1] == rows and shape[1] != weight[1])
    return (rows, *(1 for _ in weight[1:])) if by_rows else shape


def rewritten(
    source: TensorSource, layers: Sequence[Layer], spelling: Spelling
) -> Iterator[Mapping[str, Matrix | ByteArray]]:
    """Key -> numbers of every layer, one layer in memory at a time."""
    for layer in layers:
        if layer.rank is None:
            yield _copy(source, layer)
            continue
        found: dict[str, Matrix | ByteArray] = {**_factors(source, layer), **_rows(source, layer)}
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


def _rows(source: TensorSource, layer: Layer) -> dict[str, Matrix]:
    """What a layer of factors has for each row besides them: a magnitude, a bias."""
    planned = {spec.key for spec in layer.specs}
    found = {}
    for role in _ROWS:
        key = layer.keys.get(role, "")
        if key not in planned:
            continue
        values = np.zeros(layer.module.shape[0], np.float32)
        for share in layer.shares:
            if role in share.placed.adapter.parts:
                part = read_part(source, share.placed.adapter, role).reshape(-1)[slice(*share.up)]
                values[share.at : share.at + len(part)] = part
        found[key] = values
    return found


def _copy(source: TensorSource, layer: Layer) -> dict[str, Matrix | ByteArray]:
    """Parts as they are, or rows of them; cast where the plan says so."""
    adapter = layer.shares[0].placed.adapter
    specs = {spec.key: spec for spec in layer.specs}
    units = {} if _whole(layer.module, layer.shares) else row_parts(adapter)
    found: dict[str, Matrix | ByteArray] = {}
    for role, key in adapter.parts.items():
        target = specs[layer.keys[role]]
        if role in units:
            found[target.key] = _placed_rows(source, layer, role, units[role], target)
        elif target.dtype == source.specs[key].dtype:
            found[target.key] = source.read(key)
        else:
            found[target.key] = read_part(source, adapter, role)
    alpha = layer.keys.get("alpha", "")
    if "alpha" not in adapter.parts and alpha in specs:
        found[alpha] = np.array(layer.scale * (adapter.rank or 1), np.float32)
    return found


def _placed_rows(
    source: TensorSource, layer: Layer, role: str, unit: Unit, target: TensorSpec
) -> Matrix:
    """A part that has rows: those of every share where they belong, zeros elsewhere."""
    values = np.zeros(target.shape, np.float32)
    goal = np.moveaxis(values, unit.axis, 0)
    for share in layer.shares:
        part = read_part(source, share.placed.adapter, role)
        rows = np.moveaxis(part, unit.axis, 0)[share.up[0] // unit.size : share.up[1] // unit.size]
        goal[share.at // unit.size : share.at // unit.size + len(rows)] = rows.reshape(
            len(rows), *goal.shape[1:]
        )
    return values
