"""Recipes: which format each tensor has, taken from one file and given to another.

A recipe is text, one line per tensor, so that two of them can be compared with `diff`::

    # diffquant recipe 1
    tool = diffquant 0.1.0
    architecture = flux1
    type = q4_k_s

    [denoiser]
    q4_k  double_blocks.0.img_attn.proj.weight
    f32   double_blocks.0.img_attn.norm.key_norm.scale

`type` is the label of a file made from it. A section is a part of the model, a line a format and a
canonical key, which is everything to the end of the line (in JSON quotes where the key has spaces
at an end, a quote in front or control characters). Empty lines and lines with # are skipped.

convert/recipe_source.py takes a recipe from any checkpoint's header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffquant import __version__
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import find_architecture
from diffquant.convert.dialects import pack
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import (
    MalformedFile,
    PolicyError,
    UnknownFormat,
    UsageError,
    shorten,
)
from diffquant.quant.formats import FORMATS, format_named
from diffquant.quant.policy import Candidate, Decision, Rule
from diffquant.quant.types import TYPES

__all__ = [
    "MAX_RECIPE_NBYTES",
    "RECIPE_MAGIC",
    "Recipe",
    "annotate",
    "parse_recipe",
    "recipe_of",
    "recipe_rules",
    "recipe_warnings",
    "render_recipe",
]

RECIPE_MAGIC = "# diffquant recipe "
_VERSION = 1
MAX_RECIPE_NBYTES = 16 << 20
_FIELDS = ("tool", "architecture", "type")
_PART = re.compile(r"\[([a-z0-9_]+)\]")
_FIELD = re.compile(r"([a-z_]+)\s*=\s*(.*)")
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]|^\s|\s$|^\"")
_KNOWN = {**{name.lower(): None for name in STORAGE}, **dict.fromkeys(FORMATS)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A format for each tensor.

    Attributes:
        architecture: slug; a recipe serves one architecture.
        type: TYPES name that labels a file made from it, "" where nothing names one.
        formats: part -> canonical part-local key -> what it is stored as: a FORMATS name, or a
            storage dtype in lower case where no row describes the numbers.
        name: base name of the file it was read from, for reasons.
        notes: what the file it was read from could not say.
        why: what reasons say of it, "" for `recipe NAME`; a recipe that was made here and speaks
            of a part of the tensors only, on purpose, has a reason of its own.
        reasons: canonical key -> a reason of its own, in place of `why`.
    """

    architecture: str
    type: str
    formats: Mapping[str, Mapping[str, str]]
    name: str = ""
    notes: tuple[str, ...] = field(default=())
    why: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)

    def part(self, name: str) -> Mapping[str, str]:
        """Formats of one part; empty where the recipe does not speak of it."""
        return self.formats.get(name, {})


def recipe_of(architecture: str, kind: str, rows: Iterable[tuple[str, str, str]]) -> Recipe:
    """Build a recipe from (part, canonical key, stored as) rows of a plan or report."""
    formats: dict[str, dict[str, str]] = {}
    for part, key, stored in rows:
        if part:  # tensors of no part have no canonical name
            formats.setdefault(part, {}).setdefault(key, stored)
    return Recipe(architecture, kind, formats)


def render_recipe(recipe: Recipe, *, rounding: str = "nearest") -> str:
    """Write a recipe as text, with a remark on rounding; the module docstring has an example."""
    lines = [
        f"{RECIPE_MAGIC}{_VERSION}",
        f"tool = diffquant {__version__}",
        f"architecture = {recipe.architecture}",
        f"type = {recipe.type}",
    ]
    if rounding != "nearest":  # a recipe holds formats
        lines.insert(1, f"# made with --rounding {rounding}, which is no part of a recipe")
    for part, formats in recipe.formats.items():
        width = max((len(name) for name in formats.values()), default=0)
        lines += ["", f"[{part}]"]
        for key, name in formats.items():
            shown = json.dumps(key) if _ODD.search(key) else key
            lines.append(f"{name:<{width}}  {shown}")
    return "\n".join(lines) + "\n"


def parse_recipe(raw: bytes, path: Path) -> Recipe:
    """Read the text of a recipe.

    Raises:
        MalformedFile: with the line, what it has and what was expected.
        UnknownFormat: a format that nobody knows.
    """
    if len(raw) > MAX_RECIPE_NBYTES:
        raise MalformedFile(f"recipe of more than {MAX_RECIPE_NBYTES} bytes", path=path)
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"recipe is not UTF-8: {error}", path=path) from None
    version = lines[0].removeprefix(RECIPE_MAGIC).strip()
    if version != str(_VERSION):
        raise MalformedFile(
            f"recipe version {version!r:.20}, only {_VERSION} is read here", path=path
        )
    fields: dict[str, str] = {}
    formats: dict[str, dict[str, str]] = {}
    part = ""
    for number, line in enumerate(lines[1:], 2):
        text = line.strip()
        where = f"line {number}"
        if not text or text.startswith("#"):
            continue
        if section := _PART.fullmatch(text):
            part = section[1]
            if part in formats:
                raise MalformedFile(f"{where}: [{part}] appears twice", path=path)
            formats[part] = {}
        elif part:
            key, name = _entry(text, where, path)
            if key in formats[part]:
                raise MalformedFile(f"{where}: {key!r} appears twice in [{part}]", path=path)
            formats[part][key] = name
        else:
            found = _FIELD.fullmatch(text)
            if found is None or found[1] not in _FIELDS or found[1] in fields:
                raise MalformedFile(
                    f"{where}: expected one of {', '.join(_FIELDS)} once each as NAME = VALUE, or "
                    f"[PART], found {text!r:.60}",
                    path=path,
                )
            fields[found[1]] = found[2]
    return _checked(fields, formats, path)


def _entry(text: str, where: str, path: Path) -> tuple[str, str]:
    name, _, key = text.partition(" ")
    key = key.strip()
    if key.startswith('"'):
        try:
            key = json.loads(key)
        except ValueError:
            key = ""
    if not key or not isinstance(key, str):
        raise MalformedFile(f"{where}: expected FORMAT KEY, found {text!r:.60}", path=path)
    if name not in _KNOWN:
        raise UnknownFormat(name, FORMATS, what=f"format in {path.name}, {where}:")
    return key, name


def _checked(
    fields: Mapping[str, str], formats: Mapping[str, Mapping[str, str]], path: Path
) -> Recipe:
    slug, kind = fields.get("architecture", ""), fields.get("type", "")
    if find_architecture(slug) is None:
        raise MalformedFile(
            f"architecture {slug!r:.40} in a recipe, expected one of {', '.join(ARCHITECTURES)}",
            path=path,
        )
    if kind and kind not in TYPES:
        raise UnknownFormat(kind, TYPES, what=f"type in {path.name}:")
    if not any(formats.values()):
        raise MalformedFile("a recipe without a tensor", path=path)
    return Recipe(slug, kind, formats, path.name)


def recipe_rules(
    recipe: Recipe | None, part: str, candidates: Sequence[Candidate], container: str, dialect: str
) -> tuple[dict[str, Rule], dict[str, str]]:
    """What a recipe asks of one part's tensors.

    Returns:
        canonical key -> rule for the policy, and canonical key -> why the recipe is not followed
        there, which leaves the tensor to the type's own policy.
    """
    rules: dict[str, Rule] = {}
    refused: dict[str, str] = {}
    wanted = recipe.part(part) if recipe is not None else {}
    holds: dict[str, bool] = {}
    for one in candidates:
        name = wanted.get(one.key)
        if recipe is None or name is None:
            continue
        if name not in holds:
            holds[name] = name in FORMATS and _holds(name, container, dialect)
        if not one.dtype:
            why = "the tensor is not floating point" if name in FORMATS else ""
        elif name not in FORMATS or not FORMATS[name].encodes:
            why = "" if name == one.dtype else "it is read, not written"
        elif container == "gguf" and name == "bf16" and len(one.shape) < 2:
            why = "loaders of GGUF take BF16 in linear layers only"
        else:
            why = "" if holds[name] else f"a {container} output cannot hold it ({dialect})"
        if why:
            refused[one.key] = f"{recipe.name} has {name} here, but {why}"
        elif one.dtype and holds[name]:
            why = recipe.reasons.get(one.key) or recipe.why
            rules[one.key] = Rule(re.escape(one.key), name, why or f"recipe {recipe.name}".rstrip())
    return rules, refused


def _holds(name: str, container: str, dialect: str) -> bool:
    """Whether the dialect writes every part of the format, in dtypes that the container has."""
    row = format_named(name)
    try:
        packed = pack(dialect, "layer.weight", name, (256, 256), "f32")
    except PolicyError:
        return False
    if {part.name for part in row.parts} - {one.part for one in packed}:
        return False
    rows = [STORAGE[one.spec.dtype] for one in packed]
    return all(row.ggml_id is not None if container == "gguf" else row.safetensors for row in rows)


def annotate(
    decisions: Sequence[Decision], candidates: Sequence[Candidate], refused: Mapping[str, str]
) -> tuple[Decision, ...]:
    """Say in the reason where the recipe was not followed."""
    return tuple(
        replace(one, reason=f"{one.reason}; {refused[candidate.key]}")
        if candidate.key in refused
        else one
        for one, candidate in zip(decisions, candidates, strict=True)
    )


def recipe_warnings(
    recipe: Recipe | None, architecture: str, rows: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Compare a plan with its recipe; nothing that differs goes unsaid.

    Args:
        recipe: None when there is none.
        architecture: slug of the source.
        rows: (part, canonical key, stored as) of every step.

    Raises:
        UsageError: the recipe is another architecture's.
    """
    if recipe is None:
        return []
    if recipe.architecture != architecture:
        raise UsageError(
            f"{recipe.name} is a recipe of {recipe.architecture}, the source is {architecture}"
        )
    stored = {(part, key): name for part, key, name in rows if part}
    parts = {part for part, _ in stored}
    asked = {
        (part, key): name for part in recipe.formats for key, name in recipe.part(part).items()
    }
    unnamed = [key for part, key in stored if recipe.part(part) and (part, key) not in asked]
    absent = [key for part, key in asked if part in parts and (part, key) not in stored]
    out = list(recipe.notes)
    if unnamed and not recipe.why:
        out.append(
            f"the recipe does not name {len(unnamed)} tensors, which the type decides: "
            f"{shorten(unnamed, 3)}"
        )
    if absent:
        out.append(f"{len(absent)} keys of the recipe are not in the source: {shorten(absent, 3)}")
    out += [f"the recipe's part {one} is not written" for one in recipe.formats if one not in parts]
    differ: dict[str, list[str]] = {}
    for pair, name in asked.items():
        if pair in stored and stored[pair] != name:
            differ.setdefault(f"{name} -> {stored[pair]}", []).append(pair[1])
    out += [
        f"the recipe is not followed for {len(keys)} tensors, {change}: {shorten(keys, 3)}"
        for change, keys in differ.items()
    ]
    return out
