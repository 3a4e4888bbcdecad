"""Group the tensors of an adapter file: which modules it adapts, with what, and what is broken.

Names, shapes and single numbers alone; the parts themselves stay on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffquant.convert.lora.alphas import peft_config, scalar, stated_alpha
from diffquant.convert.lora.counted import counted_names
from diffquant.convert.lora.kinds import (
    AdapterKind,
    Contradiction,
    WeightShape,
    kind_named,
    kinds_of,
    lacking,
)
from diffquant.convert.lora.names import Naming, NamingRow, naming_of, place
from diffquant.convert.lora.roles import parts_of
from diffquant.convert.rules import Shape
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource

__all__ = ["Adapter", "AdapterFile", "Broken", "group_adapters"]

_SHARED = frozenset({"alpha", "magnitude"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a file holds for one module.

    Attributes:
        name: the module as the file writes it.
        part: denoiser, text_encoder, text_encoder_2 or _3; "" where the file does not say.
        naming: how `module` is written.
        module: the name without its prefix, older spellings made current.
        kind: slug of a row of KINDS.
        parts: role -> key.
        shapes: role -> shape.
        shape: of the weight it is for; None for a dimension that the parts cannot tell.
        rank: None for kinds without one.
        alpha: as the file states it; None means alpha = rank.
        rooted: alpha is divided by sqrt(rank) (PEFT's use_rslora).
        traits: "dora", "conv", "tucker", "bias".
    """

    name: str
    part: str
    naming: Naming
    module: str
    kind: str
    parts: Mapping[str, str]
    shapes: Mapping[str, Shape]
    shape: WeightShape
    rank: int | None
    alpha: float | None
    rooted: bool
    traits: tuple[str, ...]

    @property
    def label(self) -> str:
        """The kind as people call it: LoCon for LoRA of kernels, DoRA for LoRA with a magnitude."""
        if self.kind == "lora":
            name = "LoCon" if {"conv", "tucker"} & set(self.traits) else "LoRA"
            return "DoRA" if "dora" in self.traits else name
        title = kind_named(self.kind).title
        return f"{title} with DoRA" if "dora" in self.traits else title


class Broken(NamedTuple):
    """A module whose tensors make no adapter, and why; `key` is the first of them.

    `half` where nothing is wrong with what is there, but parts of it are missing.
    """

    name: str
    key: str
    reason: str
    half: bool = False


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What a file holds.

    Attributes:
        naming: whose names it has.
        adapters: in file order.
        broken: modules whose tensors contradict each other or lack a half.
        vectors: keys of token vectors that come with the adapters (textual inversion).
        ignored: (key, reason) of every tensor that is part of nothing.
    """

    naming: NamingRow
    adapters: tuple[Adapter, ...]
    broken: tuple[Broken, ...]
    vectors: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]


def group_adapters(
    source: TensorSource, config: Mapping[str, Any] | None = None
) -> AdapterFile | None:
    """Find the adapters of a file; None where no key ends like an adapter's.

    Reads single numbers only (alpha, on_input).

    Args:
        source: the opened file.
        config: PEFT's configuration; None: the one that comes with the file.

    Raises:
        MalformedFile: PEFT's configuration beside the tensors cannot be read.
    """
    parts = parts_of(source.specs)
    groups: dict[tuple[str, str], dict[str, str]] = {}
    ignored: list[tuple[str, str]] = []
    vectors: list[str] = []
    broken: list[Broken] = []
    for key in source.specs:
        part = parts.get(key)
        if part is None:
            _sort_stray(source, key, groups, vectors, ignored)
            continue
        roles = groups.setdefault((part.module, part.adapter), {})
        if part.role in roles:
            broken.append(Broken(part.module, key, f"{roles[part.role]} is the same part of it"))
        else:
            roles[part.role] = key
    if not parts:
        return None
    _join_shared(groups)
    config = peft_config(source) if config is None else config
    counted = counted_names({one: source.specs[key].shape for one, key in _downs(groups)})
    adapters: list[Adapter] = []
    for (name, _), roles in groups.items():
        made = _adapter(source, name, roles, config, counted)
        if isinstance(made, Adapter):
            adapters.append(made)
        elif made.reason:
            broken.append(made)
        else:
            ignored.append((made.key, "alpha of a layer without factors"))
    naming = naming_of(next(iter(roles.values())) for roles in groups.values())
    return AdapterFile(naming, tuple(adapters), tuple(broken), tuple(vectors), tuple(ignored))


def _sort_stray(
    source: TensorSource,
    key: str,
    groups: dict[tuple[str, str], dict[str, str]],
    vectors: list[str],
    ignored: list[tuple[str, str]],
) -> None:
    """A key without an adapter's ending: a whole norm, token vectors, or nothing known."""
    if key.endswith("_norm.scale"):  # BFL control: replaces the norm's scale
        groups.setdefault((key.removesuffix(".scale"), ""), {})["set_weight"] = key
    elif _is_vector(key, source.specs[key].shape):
        vectors.append(key)
    else:
        ignored.append((key, "no factor of a LoRA by its name"))


def _is_vector(key: str, shape: Shape) -> bool:
    """Token vectors that pivotal tuning leaves in the file: `<s1>`, `emb_params`, `clip_l` ..."""
    named = key.startswith(("<", "bundle_emb.", "emb_params")) or key in ("clip_l", "clip_g")
    return named and 1 <= len(shape) <= 2


def _downs(groups: Mapping[tuple[str, str], Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(name, roles["down"]) for (name, _), roles in groups.items() if "down" in roles]


def _join_shared(groups: dict[tuple[str, str], dict[str, str]]) -> None:
    """Alphas and magnitudes that stand alone belong to the one adapter of their module.

    An alpha has no adapter's name beside PEFT's named factors.
    """
    modules: dict[str, list[str]] = {}
    for module, adapter in groups:
        modules.setdefault(module, []).append(adapter)
    for module, adapters in modules.items():
        alone = [one for one in adapters if groups[module, one].keys() <= _SHARED]
        others = [one for one in adapters if one not in alone]
        if len(others) == 1:
            for one in alone:
                for role, key in groups.pop((module, one)).items():
                    groups[module, others[0]].setdefault(role, key)


def _adapter(
    source: TensorSource,
    name: str,
    roles: Mapping[str, str],
    config: Mapping[str, Any],
    counted: Mapping[str, str],
) -> Adapter | Broken:
    """One adapter, or why it is none; an empty reason where there is an alpha and nothing else."""
    first = next(iter(roles.values()))
    shapes = {role: source.specs[key].shape for role, key in roles.items()}
    if roles.keys() == {"alpha"}:
        return Broken(name, first, "")
    kind = _kind(shapes)
    if kind is None:
        return Broken(name, first, f"{_listed(roles)} beside no factors")
    if isinstance(kind, str):
        return Broken(name, first, kind)
    if missing := lacking(kind, frozenset(roles)):
        core = next(roles[role] for role in roles if role in kind.roles)
        why = f"the {' and '.join(missing)} factor of this layer is missing"
        return Broken(name, core, why, half=True)
    if empty := [role for role in roles if source.specs[roles[role]].size == 0]:
        return Broken(name, roles[empty[0]], f"{empty[0]} {shapes[empty[0]]} has no numbers")
    try:
        solved = kind.solve(shapes)
        _check_magnitude(shapes, solved.shape)
    except Contradiction as error:
        return Broken(name, first, str(error))
    where = place(counted.get(name, name))
    shape = solved.shape
    if kind.slug == "ia3" and "on_input" in roles:
        size = math.prod(shapes["ia3"])
        on_input = bool(_number(source, roles["on_input"]))
        shape = (None, size) if on_input else (size, None)
    alpha, rooted = stated_alpha(config, where.prefix, where.module)
    if "alpha" in roles:
        try:
            alpha, rooted = scalar(source, roles["alpha"]), False
        except MalformedFile:
            spec = source.specs[roles["alpha"]]
            why = f"alpha is {spec.dtype} {spec.shape}, expected one number"
            return Broken(name, roles["alpha"], why)
        if not math.isfinite(alpha):
            return Broken(name, roles["alpha"], f"alpha is {alpha}, expected a finite number")
    traits = [*solved.traits]
    traits += ["dora"] if "magnitude" in roles else []
    traits += ["bias"] if {"up_bias", "diff_b"} & roles.keys() and kind.slug != "full" else []
    return Adapter(
        name=name,
        part=where.part,
        naming=where.naming,
        module=where.module,
        kind=kind.slug,
        parts=dict(roles),
        shapes=shapes,
        shape=shape,
        rank=solved.rank,
        alpha=alpha if kind.slug not in ("oft", "boft") else None,
        rooted=rooted,
        traits=tuple(traits),
    )


def _kind(shapes: Mapping[str, Shape]) -> AdapterKind | str | None:
    """The kind these roles make; a text where they make two; None where they make none."""
    hits = kinds_of(shapes)
    extra = [kind for kind in hits if kind.slug == "full"]
    if len(hits) > 1 and extra and "diff" not in shapes:  # diff_b: the bias of another kind
        hits = tuple(kind for kind in hits if kind.slug != "full")
    if len(hits) > 1:
        return f"parts of {' and '.join(kind.title for kind in hits)} in one layer"
    if not hits:
        return None
    if hits[0].slug == "oft" and len(shapes.get("oft_blocks", ())) == 4:
        return kind_named("boft")
    return hits[0]


def _check_magnitude(shapes: Mapping[str, Shape], weight: WeightShape) -> None:
    """A magnitude has a number for each row of the weight, or for each column."""
    size = math.prod(shapes["magnitude"]) if "magnitude" in shapes else 0
    if size and weight and size not in weight[:2]:
        raise Contradiction(
            f"expected a magnitude for {weight[0]} rows or {weight[1]} columns, found "
            f"{shapes['magnitude']}"
        )


def _number(source: TensorSource, key: str) -> float:
    try:
        return scalar(source, key)
    except MalformedFile:
        return 0.0


def _listed(roles: Mapping[str, str]) -> str:
    return " and ".join(sorted(roles))
