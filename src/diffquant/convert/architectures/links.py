"""Links: which module of one naming is which module of the other.

A link names modules (or whole keys), not parameters: `.weight`, `.bias` and whatever else hangs
below a module follow it. One table of links serves both directions:

    Diffusers -> canonical     rename | fuse    | swap | to 1x1 convolution | transpose
    canonical -> Diffusers     rename | split   | swap | to linear          | transpose
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from diffquant.convert.architectures.names import Named
from diffquant.convert.rules import (
    Drop,
    Fuse,
    Rename,
    Reorder,
    Reshape,
    Rule,
    Shape,
    Shapes,
    Split,
    Transpose,
)

__all__ = ["Link", "Op", "backward", "forward", "rename_table", "translate"]

Op: TypeAlias = Literal["rename", "fuse", "swap", "conv1x1", "transpose", "drop"]


@dataclass(frozen=True, slots=True)
class Link:
    """One correspondence.

    Attributes:
        diffusers: Diffusers modules; several only for `fuse`, none for `drop`.
        canonical: the canonical module.
        op: what happens to the rows; `swap` exchanges the two halves, `conv1x1` views a linear
            weight (O, I) as a convolution's (O, I, 1, 1), `drop` has no place in Diffusers.
        rows: for `fuse`, the rows of each member, needed to split; empty means equal parts.
        reason: for `drop`.
    """

    diffusers: tuple[str, ...]
    canonical: str
    op: Op = "rename"
    rows: tuple[int, ...] = ()
    reason: str = ""


def rename_table(rows: Mapping[str, str], diffusers: str = "", canonical: str = "") -> list[Link]:
    """Links of a table {diffusers module: canonical module}, below two parent modules."""
    return [Link((diffusers + a,), canonical + b) for a, b in rows.items()]


def forward(links: Iterable[Link], shapes: Shapes) -> tuple[Rule, ...]:
    """Rules from Diffusers to canonical, in source order; keys without a link get no rule."""
    index = {module: link for link in links for module in link.diffusers}
    rules: list[Rule] = []
    fused: set[str] = set()
    for key in shapes:
        module = _module(key, index)
        if module is None:
            continue
        link, rest = index[module], key[len(module) :]
        target = link.canonical + rest
        if link.op != "fuse":
            rules.append(_forward_one(link.op, key, target, shapes[key]))
        elif target not in fused:
            fused.add(target)
            rules.append(Fuse(tuple(one + rest for one in link.diffusers), target))
    return tuple(rules)


def _forward_one(op: Op, key: str, target: str, shape: Shape) -> Rule:
    if op == "swap":
        return Reorder(key, target, (1, 0))
    if op == "transpose":
        return Transpose(key, target)
    if op == "conv1x1" and len(shape) == 2:
        return Reshape(key, target, (*shape, 1, 1))
    return Rename(key, target)


def backward(links: Iterable[Link], shapes: Shapes) -> tuple[Rule, ...]:
    """Rules from canonical to Diffusers, in source order; keys without a link get no rule."""
    index = {link.canonical: link for link in links}
    rules: list[Rule] = []
    for key, shape in shapes.items():
        module = _module(key, index)
        if module is None:
            continue
        link, rest = index[module], key[len(module) :]
        if link.op == "drop":
            rules.append(Drop(key, link.reason))
            continue
        targets = tuple(one + rest for one in link.diffusers)
        if link.op == "fuse":
            count = len(targets)
            rows = link.rows or (shape[0] // count,) * count
            rules.append(Split(key, targets, rows))
        elif link.op == "conv1x1" and shape[2:] in {(1, 1), (1,)}:
            rules.append(Reshape(key, targets[0], shape[:2]))
        else:
            rules.append(_forward_one(link.op, key, targets[0], ()))
    return tuple(rules)


def translate(rules: Iterable[Rule], shapes: Shapes) -> dict[str, Shape]:
    """Shapes after `rules`, without the checks of `apply_rules`: for looking, not for writing."""
    found = Named()
    for rule in rules:
        if isinstance(rule, Rename):  # most of them
            found[rule.target] = shapes[rule.source]
        elif all(key in shapes for key in rule.sources):
            found.update((one.target, one.shape) for one in rule.assignments(shapes))
    return found


def _module(key: str, index: Mapping[str, Link]) -> str | None:
    """The longest leading run of name segments that has a link."""
    while key not in index:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return key
