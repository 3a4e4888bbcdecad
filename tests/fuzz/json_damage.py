"""Seeded damage to JSON: as a tree, and as the text that no tree could be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from contents import Content

NAMES = (
    "", "\0", "a\0b", "../../etc/passwd", "/etc/passwd", "C:\\x", "..", "\ud800", "é" * 60,
    "x" * 70_000, "__metadata__", "\x1b[2J", "weight", ".weight", "a..b", "\u202egpj.exe",
    "blocks.0.attn.qkv.weight", "blocks.99999999999999999999.w.weight", "🙂.weight", "%s%n{0}",
    "model.diffusion_model.input_blocks.0.0.weight",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 4, 2**31, 2**53, 2**62, 2**63, 2**64, 10**40, 1e308, -0.0, 1.5,
    float("nan"), float("inf"), "", "0", "x", [], {}, [[]], [None], [0], [0, 0], [-1, 4],
    [2**40] * 4, {"a": 1}, {"": None}, ["F32", "F16"], "F32", "F4",
    "BF16", "F8_E4M3", "U8", "I64", "Q4_0",
    "float8_e4m3fn", "nf4", [1] * 40, *NAMES,
)  # fmt: skip


def _nested(depth: int, rng: random.Random) -> str:
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + ("1" if opening != "[" else "") + closing * depth


def _places(tree: Any, rng: random.Random) -> list[tuple[Any, Any]]:
    """Every (container, key or index), a sample where there are many."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending and len(found) < 5000:
        item = pending.pop(rng.randrange(len(pending)))
        if isinstance(item, dict):
            found += [(item, key) for key in item]
            pending += item.values()
        elif isinstance(item, list):
            found += [(item, index) for index in range(len(item))]
            pending += item
    return found


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type: off by a little, or absurd."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, value + 2**32, 0, float(value)))
    if isinstance(value, str):
        text = damage_text(value, rng) if value[:1] in "{[" else value
        return rng.choice((text, text, value + "x", value[:-1], value.upper(), [value]))
    if isinstance(value, list):
        return rng.choice(
            (value + value, value[:-1], value[::-1], [value], [str(v) for v in value])
        )
    return rng.choice(VALUES)


def damage_tree(tree: Any, rng: random.Random) -> Any:
    """Change a JSON tree in a few places."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = _places(tree, rng)
        if not places:
            return rng.choice(VALUES)
        item, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            item[key] = rng.choice(VALUES)
        elif kind in (1, 2):
            item[key] = _near(item[key], rng)
        elif kind == 3:
            del item[key]
        elif kind == 4 and isinstance(item, dict):
            item[rng.choice((*NAMES, str(key) + "x"))] = item.pop(key)
        elif isinstance(item, dict):
            item[rng.choice(NAMES)] = item[key]
        else:
            item.append(rng.choice(VALUES))
    return tree


def damage_text(text: str, rng: random.Random) -> str:
    """Change JSON as a tree, or as text where a tree cannot say it."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(
            (
                _nested(100_000, rng),
                _nested(900, rng),
                "1" * 5000,
                '{"a":' + "9" * 4000 + "}",
                "",
                "null",
                "{",
                '{"a":1,"a":2}',
                "\ufeff{}",
                "[" + "0," * 200_000 + "0]",
                '"' + "\\ud800" + '"',
            )
        )
    if kind == 1 and len(text) > 2:
        at = rng.randrange(len(text))
        junk = rng.choice(('"', "{", "}", "[", ",", "\\", "\0", "1e999", "NaN"))
        return text[:at] + junk + text[at + 1 :]
    try:
        return json.dumps(damage_tree(json.loads(text), rng))
    except (ValueError, RecursionError):
        return text[: len(text) // 2]


def damage_json(content: Content, rng: random.Random, _canary: Path) -> Content:
    text = damage_text(content.head.decode("utf-8", "replace"), rng)
    return Content(text.encode("utf-8", "surrogatepass"), 0)
