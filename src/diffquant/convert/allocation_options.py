"""Which formats a tensor of the denoiser could have, and what each takes in the file.

The same policy decides here that decides for a named type: each candidate format is planned as a
type of its own, one format throughout, and a tensor's options are what these plans store it as. So
keep lists, user rules, shapes, reshapes and fallbacks hold, and sizes are those that are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant.convert.allocation_part import AllocatedPart
from diffquant.convert.architectures.base import Architecture
from diffquant.convert.dialects import own_dialect
from diffquant.convert.logical import LogicalSource
from diffquant.convert.recipes import Recipe
from diffquant.convert.request import Request
from diffquant.convert.step import Step
from diffquant.convert.steps import part_steps
from diffquant.convert.targets import TARGETS, Target, candidates
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import ALIASES, TYPES, QuantType

__all__ = [
    "Among",
    "Choices",
    "among_from",
    "container_of",
    "label_type",
    "step_nbytes",
    "tensor_options",
    "usual_formats",
]

_CASTS = ("bf16", "f16")
# Without --among: formats with a published mix, whose encoders are fast; then what readers have.
_USUAL: Mapping[str, tuple[str, ...]] = {
    "gguf": (
        "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl",
        "iq4_xs", *_CASTS,
    ),
    "safetensors": ("asym_w4a8_int8", "fp8_e4m3_scaled", "int8_rowwise", "int8_convrot", *_CASTS),
}  # fmt: skip
_GGUF_ALIGNMENT = 32
_ENTRY_NBYTES = 70  # of a tensor in a safetensors header, its name aside


def usual_formats(container: str) -> tuple[str, ...]:
    """What bits are allocated among where nothing is named; () for containers of no allocation."""
    return _USUAL.get(container, ())


@dataclass(frozen=True, slots=True)
class Among:
    """The formats that may be chosen from.

    Attributes:
        packed: quantized formats, the smallest first.
        casts: floating point formats.
        dialect: that writes them side by side.
        target: that reads them all.
    """

    packed: tuple[str, ...]
    casts: tuple[str, ...]
    dialect: str
    target: Target

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.packed, *self.casts)


@dataclass(frozen=True, slots=True)
class Choices:
    """What every weight could have.

    Attributes:
        steps: canonical key -> stored format -> the step that stores it so, in file order.
        kept: of layers that types keep and that were freed: key -> the step that keeps it.
    """

    steps: Mapping[str, Mapping[str, Step]]
    kept: Mapping[str, Step]


def among_from(
    names: Sequence[str], container: str, target: str, readers: Sequence[str] = ()
) -> Among:
    """Look the formats up that were named, or take the usual ones of a container.

    Args:
        names: formats, or types, which stand for their base format; empty for the usual ones.
        container: "gguf" or "safetensors".
        target: as asked for, "" for the first that reads all of them.
        readers: targets to try where none is asked for; () for the container's defaults.

    Raises:
        UnknownFormat: a name that is neither.
        UsageError: formats that no such file, or no one reader, has side by side.
    """
    rows = candidates(target, container)
    if readers and not target:
        rows = tuple(TARGETS[name] for name in readers)
    if not names:
        first = rows[0]
        held = [name for name in _USUAL[container] if name in first.reads[container]]
        if container == "safetensors" and not any(own_dialect(one) == "comfy" for one in held):
            held = [name for name in ("nf4", *_CASTS) if name in first.reads[container]]
        return _among(held, container, first)
    found = list(dict.fromkeys(_format_of(name) for name in names))
    for row in rows:
        if all(name in row.reads[container] for name in found):
            return _among(found, container, row)
    readable = sorted({name for row in rows for name in row.reads[container]} & _offered(container))
    odd = [name for name in names if name not in _read_by(rows, names, container)]
    what = f"no reader of it has {', '.join(odd)}" if odd else "no one reader has them all"
    named = f" for {target}" if target else ""
    raise UsageError(
        f"--among {','.join(names)}: {what} in a {container} file{named}; it may be among "
        f"{', '.join(readable)}"
    )


def container_of(names: Sequence[str], target: str) -> str:
    """The first container that holds the formats side by side, for an output without a name.

    Raises:
        UnknownFormat: a name that is neither format nor type, or no such target.
        UsageError: no container does; told of the one that holds each of them, else of all.
    """
    wanted = [one for one in _USUAL if target not in TARGETS or one in TARGETS[target].reads]
    errors: dict[str, UsageError] = {}
    for container in wanted or _USUAL:
        try:
            among_from(names, container, target)
        except UsageError as error:
            errors[container] = error
        else:
            return container
    first = next(iter(errors.values()))
    if len(errors) == 1:
        raise first
    held = {one: _read_by(candidates(target, one), names, one) for one in errors}
    for container, some in held.items():
        if len(some) == len(names):
            raise errors[container]
    told = "; ".join(
        f"a {one} file holds {', '.join(some) or 'none of them'}" for one, some in held.items()
    )
    named = f" for {target}" if target else ""
    raise UsageError(f"--among {','.join(names)}: no one file has them all{named}: {told}")


def _read_by(rows: Sequence[Target], names: Sequence[str], container: str) -> list[str]:
    """Names whose format one of the rows reads in such a container."""
    return [name for name in names if any(_format_of(name) in row.reads[container] for row in rows)]


def _format_of(name: str) -> str:
    key = ALIASES.get(name.lower(), name.lower()) if name.lower() not in FORMATS else name.lower()
    offered = frozenset[str]().union(*map(_offered, _USUAL))
    if key in FORMATS and (FORMATS[key].is_cast or key in offered):
        return key
    kind = TYPES.get(key)
    if kind is not None:
        return kind.base
    if key in FORMATS:
        raise UsageError(f"--among {name}: {key} is a format of no type that is written")
    raise UnknownFormat(name, sorted(offered), what="format in --among:")


def _offered(container: str) -> frozenset[str]:
    """Formats that some type of the container is based on."""
    return frozenset(kind.base for kind in TYPES.values() if container in kind.dialects)


def _among(names: Sequence[str], container: str, target: Target) -> Among:
    packed = sorted((n for n in names if not FORMATS[n].is_cast), key=lambda n: FORMATS[n].bits)
    casts = tuple(name for name in names if FORMATS[name].is_cast)
    if not packed:
        raise UsageError(
            f"--among {','.join(names)}: nothing quantized to choose; name a format such as "
            f"{next(n for n in _USUAL[container] if n not in _CASTS)}"
        )
    dialects = {own_dialect(name) for name in packed} - {"plain"}
    if len(dialects) > 1:
        raise UsageError(
            f"--among {','.join(names)}: {' and '.join(sorted(dialects))} layers do not go into "
            "one file"
        )
    dialect = "gguf" if container == "gguf" else next(iter(dialects), "plain")
    return Among(tuple(packed), casts, dialect, target)


def label_type(fmt: str, container: str) -> QuantType | None:
    """The plainest type that is based on a format; None for one that rows fall back to only."""
    kinds = [one for one in TYPES.values() if one.base == fmt and container in one.dialects]
    return min(kinds, key=lambda one: len(one.mix), default=None)


def tensor_options(
    logical: LogicalSource,
    part: AllocatedPart,
    request: Request,
    among: Among,
    *,
    free_kept: bool = False,
) -> Choices:
    """Options of every weight of a part that a type would pack.

    Tensors that user rules decide have none, nor have those that the architecture keeps, unless
    `free_kept`: then the rows of its list that are marked so stand aside. These tensors may stay as
    they are kept, whatever formats there are to choose from.
    """
    asked = replace(request, pure=False, target=among.target.name, recipe=None)
    freed = _freed(part.architecture) if free_kept else part.architecture
    options: dict[str, dict[str, Step]] = {}
    for name in among.packed:
        one = replace(asked, type=_throughout(name, request, among))
        for step in part_steps(logical, freed, part.match, one, among.target, part.count):
            asked_for = step.stored == name or step.decision.wanted == name
            if asked_for and not step.decision.reason.startswith(("--tensor-type", "--exclude")):
                options.setdefault(step.key, {}).setdefault(step.stored, step)
    kept = _kept(logical, part, asked, among, options) if free_kept else {}
    for name, step in _cast_steps(logical, part, asked, among, options.keys() - kept.keys()):
        options[step.key].setdefault(name, step)
    for key, step in kept.items():
        options[key][step.stored] = step
    return Choices(options, kept)


def _throughout(name: str, request: Request, among: Among) -> QuantType:
    """A type of its own: one format throughout."""
    return QuantType(name, name, {request.container: among.dialect}, "", convs=_convs(name))


def _convs(name: str) -> bool:
    return any(kind.convs for kind in TYPES.values() if kind.base == name)


def _freed(architecture: Architecture) -> Architecture:
    return replace(
        architecture,
        keep=tuple(row for row in architecture.keep if not row.frees),
        tuned_keep=tuple(row for row in architecture.tuned_keep if not row.frees),
    )


def _kept(
    logical: LogicalSource,
    part: AllocatedPart,
    request: Request,
    among: Among,
    options: Mapping[str, object],
) -> dict[str, Step]:
    """Steps, as types keep them, of the tensors that have options only because they were freed."""
    rows = [row for row in (*part.architecture.tuned_keep, *part.architecture.keep) if row.frees]
    asked = replace(request, type=_throughout(among.packed[0], request, among))
    steps = part_steps(logical, part.architecture, part.match, asked, among.target, part.count)
    return {
        step.key: step
        for step in steps
        if step.key in options and any(re.search(row.pattern, step.key) for row in rows)
        if step.stored not in among.packed
    }


def _cast_steps(
    logical: LogicalSource,
    part: AllocatedPart,
    request: Request,
    among: Among,
    keys: Iterable[str],
) -> Iterator[tuple[str, Step]]:
    """The same weights as floating point numbers: what a recipe that says so would store."""
    wanted = frozenset(keys)
    kind = _throughout(among.packed[0], request, among)
    for name in among.casts:
        recipe = Recipe(part.architecture.slug, "", {part.name: dict.fromkeys(wanted, name)})
        asked = replace(request, type=kind, recipe=recipe)
        steps = part_steps(logical, part.architecture, part.match, asked, among.target, part.count)
        for step in steps:
            if step.key in wanted and step.stored == name:
                yield name, step


def step_nbytes(step: Step, container: str) -> int:
    """Bytes that a step takes in a file: alignment, and about what its header entries take."""
    if container == "gguf":
        return sum(-(-one.spec.nbytes // _GGUF_ALIGNMENT) * _GGUF_ALIGNMENT for one in step.packed)
    names = sum(len(one.spec.key.encode()) + _ENTRY_NBYTES for one in step.packed)
    return step.nbytes + names
