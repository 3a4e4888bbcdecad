"""Seeded damage to the files of a sample, by what each file is.

A sample is a dict of relative path -> `Content`. `mutate` changes it in place and says what it did.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from contents import HEAD_NBYTES, Content, damage_bytes
from gguf_damage import damage_gguf, rebuild_gguf
from json_damage import damage_json
from safetensors_damage import damage_safetensors, rebuild_safetensors
from torch_damage import damage_pickle, damage_zip

Files = dict[str, Content]
Damage = Callable[[Content, random.Random, Path], Content]
# What damaging a structure raises where an earlier damage left none.
_GONE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    struct.error, zlib.error,
)  # fmt: skip


def load(folder: Path) -> Files:
    """Read a sample."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            found[str(path.relative_to(folder))] = Content(
                raw[:HEAD_NBYTES], max(len(raw) - HEAD_NBYTES, 0)
            )
    return found


def mutate(files: Files, rng: random.Random, canary: Path) -> str:
    """Damage one file, or several; returns what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(files)) if files else ""
        if not name:
            break
        content = files[name]
        choices = [damage_bytes]
        structured = _structured(name, content, rng)
        if structured is not None:
            choices = [structured, structured, structured, damage_bytes]
        how = rng.choice(choices)
        try:
            files[name] = how(content, rng, canary)
        except _GONE:
            files[name] = damage_bytes(content, rng, canary)
        done.append(f"{name}: {how.__name__.strip('_')}")
        if rng.random() < 0.04:
            done.append(_damage_names(files, name, rng))
    return "; ".join(done)


def _structured(name: str, content: Content, rng: random.Random) -> Damage | None:
    if name.endswith(".json"):
        return damage_json
    if content.head[:4] == b"GGUF":
        return rng.choice((damage_gguf, rebuild_gguf))
    if content.head[:4] == b"PK\x03\x04":
        return damage_zip
    if content.head[:1] == b"\x80":
        return damage_pickle
    if content.head[8:9] == b"{":
        return rng.choice((damage_safetensors, rebuild_safetensors))
    return None


def _damage_names(files: Files, name: str, rng: random.Random) -> str:
    content = files.pop(name)
    if rng.random() < 0.5:
        return f"{name} removed"
    new = rng.choice((name + ".gguf", name.replace("main", "main.fp16"), "extra.safetensors", name))
    files[new] = content
    return f"{name} -> {new}"
