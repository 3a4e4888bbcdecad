"""extract_lora(): the difference of two models as a LoRA, the best at the rank asked for.

    delta = tuned - base, in canonical rows       up @ down ~ delta, alpha = rank

The two may differ in layout, container and dtype: rows are compared by their canonical names. One
difference is in memory at a time, with what its decomposition needs (quant/lowrank.py), and the
factors found so far. Weights that do not differ get no layer; vectors (biases, norms) have no place
in a LoRA and are counted.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffquant.convert.architectures.parts import architecture_named
from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.jobs import opened
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.modules import Model, model_of
from diffquant.convert.lora.pairs import Matrix, stored_bytes, write
from diffquant.convert.lora.places import Module
from diffquant.convert.lora.ranks import Keep
from diffquant.convert.lora.spelling import SPELLINGS, keys_of, module_prefix, modules_for
from diffquant.convert.lora.workshop import check_output, peft_config_of
from diffquant.convert.lora.written import lora_header
from diffquant.convert.match import Match, to_canonical
from diffquant.convert.rules import Assignment
from diffquant.convert.stored import is_layer, tables_of
from diffquant.core.errors import ArchitectureError, MalformedFile, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSpec
from diffquant.quant.lowrank import best_factors

__all__ = ["ExtractReport", "ExtractedLayer", "extract_lora"]

_STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_FIRST_RANK = 64  # that a measure is tried with; doubled until it is met
_ROWS = 1 << 22  # numbers compared at once


@dataclass(frozen=True, slots=True)
class ExtractedLayer:
    """One layer: its rank, the size of the difference, and the share of its square that is kept."""

    part: str
    module: str
    rank: int
    norm: float
    kept: float


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        tuned, base, output: paths.
        architecture: slug.
        to: SPELLINGS name.
        layers: every layer written.
        ranks: rank -> layers.
        kept: share of the squared difference of these layers that is kept.
        same: weights that do not differ.
        vectors: vectors that differ, which a LoRA cannot hold.
        left_out: (weight, reason) of others that it does not hold.
        nbytes: of all tensors.
        dry_run: nothing was written.
        notes: sentences for people.
    """

    tuned: str
    base: str
    output: str
    architecture: str
    to: str
    layers: tuple[ExtractedLayer, ...]
    ranks: Mapping[str, int]
    kept: float
    same: int
    vectors: int
    left_out: tuple[tuple[str, str], ...]
    nbytes: int
    dry_run: bool
    notes: tuple[str, ...]


def extract_lora(
    tuned: Path,
    base: Path,
    out: Path,
    keep: Keep,
    *,
    to: str = "kohya",
    dtype: str = "f16",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> ExtractReport:
    """Make a LoRA of what a fine-tune changed.

    Args:
        tuned: the fine-tune.
        base: what it was made of.
        out: a safetensors file.
        keep: what to keep of each difference.
        to: SPELLINGS name.
        dtype: f32, f16 or bf16 for the factors.
        force: replace an existing output.
        dry_run: measure, write nothing.
        progress: told about bytes of differences.

    Raises:
        DiffquantError: see core/errors.py; two architectures, or no difference, are refused.
    """
    check_output(out, [tuned, base], force=force or dry_run)
    with ExitStack() as stack:
        _, left, one = stack.enter_context(opened(tuned, alone=True))
        _, right, two = stack.enter_context(opened(base, alone=True))
        if one.architecture != two.architecture:
            raise ArchitectureError(
                f"{tuned} is {one.architecture}, {base} is {two.architecture}: a difference needs "
                "two models of one architecture"
            )
        work = _Work(left, right, one, two, keep, to, _STORED[dtype])
        work.run(progress)
        if not work.rows:
            raise UsageError(f"{tuned} and {base} do not differ in any weight a LoRA can hold")
        specs = [spec for spec, _ in work.stored.values()]
        if not dry_run:
            layers: Iterator[Mapping[str, Matrix | ByteArray]] = (
                {key: data} for key, (_, data) in work.stored.items()
            )
            write(out, specs, layers, work.header(out.stem), force=force)
        total = sum(row.norm**2 for row in work.rows)
        counts = Counter(str(row.rank) for row in work.rows)
        return ExtractReport(
            tuned=str(tuned),
            base=str(base),
            output=str(out),
            architecture=one.architecture,
            to=to,
            layers=tuple(work.rows),
            ranks=dict(counts.most_common()),
            kept=sum(row.kept * row.norm**2 for row in work.rows) / total if total else 1.0,
            same=work.same,
            vectors=work.vectors,
            left_out=tuple(work.left_out),
            nbytes=sum(spec.nbytes for spec in specs),
            dry_run=dry_run,
            notes=tuple(work.notes()),
        )


class _Work:
    """The walk over both models: what was found so far."""

    def __init__(
        self,
        left: LogicalSource,
        right: LogicalSource,
        tuned: Match,
        base: Match,
        keep: Keep,
        to: str,
        held: str,
    ) -> None:
        self.sides = (left, right)
        self.matches = (tuned, base)
        self.model: Model = model_of(base)
        self.keep = keep
        self.spelling = SPELLINGS[to]
        self.held = held
        self.rows: list[ExtractedLayer] = []
        self.stored: dict[str, tuple[TensorSpec, ByteArray]] = {}
        self.left_out: list[tuple[str, str]] = []
        self.same = self.vectors = 0

    def run(self, progress: Progress) -> None:
        """Every part that both models have."""
        names = [name for name in self.model.parts if self.matches[0].part(name)]
        for name in self.model.parts.keys() - set(names):
            self.left_out.append((name, "the fine-tune's file does not hold it"))
        weights = {name: self._weights(name) for name in names}
        total = sum(4 * math.prod(a.shape) for rows in weights.values() for a, _ in rows.values())
        progress.start("differences", total)
        try:
            for name in names:
                self._part(name, weights[name], alone=len(names) == 1, progress=progress)
        finally:
            progress.stop()

    def _weights(self, name: str) -> dict[str, tuple[Assignment, Assignment]]:
        """Canonical key -> where its rows are on both sides, for those of one shape."""
        sides = []
        for match in self.matches:
            part = match.part(name)
            assert part is not None
            sides.append({one.target: one for one in to_canonical(part)})
        both = {}
        for key, mine in sides[0].items():
            other = sides[1].get(key)
            if other is None:
                self.left_out.append((key, "the base has no such weight"))
            elif mine.shape != other.shape:
                why = f"{mine.shape} in the fine-tune, {other.shape} in the base"
                self.left_out.append((key, why))
            elif mine.pieces and other.pieces and not (mine.axis or other.axis):
                both[key] = (mine, other)
        return both

    def _part(
        self,
        name: str,
        weights: Mapping[str, tuple[Assignment, Assignment]],
        *,
        alone: bool,
        progress: Progress,
    ) -> None:
        part = self.model.parts[name]
        prefix = module_prefix(self.spelling, self.model, part, alone=alone)
        tables = tables_of(architecture_named(self.model.architecture))
        reached: set[str] = set()
        for module in modules_for(self.spelling, part).values():
            keys = {piece.key for piece in module.pieces}
            if len(module.shape) < 2 or not keys <= weights.keys():
                continue
            if name != "denoiser":
                layer = not _is_table(module.name)  # CLIP-G keeps q, k and v in a bare parameter
            else:
                layer = all(is_layer(key, weights[key][0].shape, tables) for key in keys)
            if not layer:
                continue
            reached |= keys
            self._layer(name, module, weights, prefix)
            progress.advance(4 * math.prod(module.shape), module.name)
        for key in weights.keys() - reached:
            self._rest(key, weights[key])

    def _layer(
        self,
        part: str,
        module: Module,
        weights: Mapping[str, tuple[Assignment, Assignment]],
        prefix: str,
    ) -> None:
        delta = np.concatenate(
            [self._difference(weights[p.key], (p.start, p.stop)) for p in module.pieces]
        )
        delta = np.ascontiguousarray(delta.T) if module.transposed else delta
        total = float(np.einsum("ij,ij->", delta, delta, dtype=np.float64))
        if not math.isfinite(total):
            raise MalformedFile(f"{module.name}: NaN or infinity in the difference")
        if total == 0.0:
            self.same += 1
            return
        conv = math.prod(module.shape[2:]) > 1
        up, down, kept = _factors(delta, self.keep, total, conv=conv, seed=module.name)
        rank = len(down)
        keys = keys_of(self.spelling, prefix, module.name)
        tail = module.shape[2:]
        arrays = {
            "down": down.reshape(rank, module.shape[1], *tail),
            "up": up.reshape(module.shape[0], rank, *(1 for _ in tail)),
        }
        for role, values in arrays.items():
            spec = TensorSpec(keys[role], self.held, values.shape)
            self.stored[spec.key] = (spec, stored_bytes(spec.key, self.held, values))
        if self.spelling.alpha:
            spec = TensorSpec(keys["alpha"], "F32", ())
            number = np.array(rank, np.float32)
            self.stored[spec.key] = (spec, stored_bytes(spec.key, "F32", number))
        self.rows.append(ExtractedLayer(part, module.name, rank, math.sqrt(total), kept / total))

    def _difference(self, sides: tuple[Assignment, Assignment], rows: tuple[int, int]) -> Matrix:
        """Rows of tuned - base, filled in chunks."""
        width = math.prod(sides[0].shape[1:])
        found = np.empty((rows[1] - rows[0], width), np.float32)
        step = max(_ROWS // max(width, 1), 1)
        for start in range(rows[0], rows[1], step):
            span = (start, min(start + step, rows[1]))
            mine, other = (
                canonical_rows(logical, one, span)
                for logical, one in zip(self.sides, sides, strict=True)
            )
            np.subtract(mine, other, out=found[start - rows[0] : span[1] - rows[0]])
        return found

    def _rest(self, key: str, sides: tuple[Assignment, Assignment]) -> None:
        """What is no layer: whether it differs is all that is told."""
        if not all(self.sides[0].tensors[piece.key].is_float for piece in sides[0].pieces):
            return
        shape = sides[0].shape
        rows = (0, shape[0] if len(shape) > 1 else 1)
        if not self._difference_of_rest(sides, rows):
            return
        if len(shape) < 2:
            self.vectors += 1
        else:
            self.left_out.append((key, "a table or parameter, no layer's weight"))

    def _difference_of_rest(
        self, sides: tuple[Assignment, Assignment], rows: tuple[int, int]
    ) -> bool:
        mine, other = (
            canonical_rows(logical, one, rows)
            for logical, one in zip(self.sides, sides, strict=True)
        )
        return bool(np.any(mine != other))

    def header(self, title: str) -> dict[str, str]:
        """What readers look for, and PEFT's configuration where the naming has one."""
        rank = max(row.rank for row in self.rows)
        found = lora_header(self.model.architecture, self.model.variant, title, rank)
        if len({row.rank for row in self.rows}) > 1:
            found |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
        if self.spelling.alpha:
            return found
        folders: dict[str, dict[str, int]] = {}
        for row in self.rows:
            folder = self.model.parts[row.part].folder
            folders.setdefault(folder, {})[row.module] = row.rank
        alone = self.spelling.slug != "diffusers" and len(folders) == 1
        return {**found, **peft_config_of(folders, alone=alone)}

    def notes(self) -> Iterator[str]:
        """What a user should know of the result."""
        if self.vectors:
            yield (
                f"{self.vectors} vectors (biases, norms) differ too: a LoRA has no place for them"
            )
        packed = [
            side.source.path.name
            for side in self.sides
            if any(one.is_quantized for one in side.tensors.values())
        ]
        if packed:
            yield f"{shorten(packed)}: packed weights; their rounding is part of the difference"


def _is_table(module: str) -> bool:
    """Embeddings of text encoders, and T5's table of distances."""
    return module.endswith(("embedding", "shared", "embed_tokens", "relative_attention_bias"))


def _factors(
    delta: Matrix, keep: Keep, total: float, *, conv: bool, seed: str
) -> tuple[Matrix, Matrix, float]:
    """The factors that `keep` asks for, and the squared size they keep.

    With a measure the leading singular values are found first, more of them until it is met.
    """
    most = min(delta.shape)
    limit = min(keep.limit(conv=conv) or most, most)
    tried = min(limit, _FIRST_RANK) if keep.measure else limit
    if keep.measure == "sv_cumulative":  # a share of all of them
        tried = most
    while True:
        up, down = best_factors(delta, tried, seed=zlib.crc32(seed.encode()))
        values = np.linalg.norm(up.astype(np.float64), axis=0) * np.linalg.norm(down, axis=1)
        count = keep.count(values, total, conv=conv)
        met = count < tried or tried == limit
        if not keep.measure or met or tried >= most:
            break
        tried = min(2 * tried, limit)
    kept = float((values[:count] ** 2).sum())
    return np.ascontiguousarray(up[:, :count]), down[:count], min(kept, total)
