"""Seeded damage to torch.save files: the pickle, the entries of the archive, its records."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

from contents import INTEGERS, Content, damage_bytes
from pickles import mutate_pickle


def damage_pickle(content: Content, rng: random.Random, canary: Path) -> Content:
    return replace(content, head=mutate_pickle(content.head, rng, canary))


def damage_zip(content: Content, rng: random.Random, canary: Path) -> Content:
    """Write the archive anew with another pickle or other entries, or lie in its records."""
    if rng.random() < 0.3:
        return _lie_in_zip(content, rng)
    source = io.BytesIO(content.head + bytes(content.zeros))
    try:
        with zipfile.ZipFile(source) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError):
        return damage_bytes(content, rng, canary)
    compress = rng.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compress) as archive:
        warnings.simplefilter("ignore")  # names that are there twice are meant
        for name, raw in entries:
            if name.endswith("data.pkl"):
                raw = mutate_pickle(raw, rng, canary)
            elif rng.random() < 0.05:
                raw = rng.choice((b"", raw[:-1], raw + b"x", b"big", bytes(1 << 20)))
            if rng.random() < 0.03:
                continue
            target = name
            if rng.random() < 0.03:
                target = rng.choice(
                    ("../" + name, "/" + name, name.replace("/", "\\"), "x" * 60_000, name + "\0")
                )
            archive.writestr(target, raw)
        if rng.random() < 0.1:
            archive.writestr(
                rng.choice(("archive/constants.pkl", "b/data.pkl", "x/y/z")), b"\x80\x02N."
            )
    return Content(out.getvalue(), 0)


def _lie_in_zip(content: Content, rng: random.Random) -> Content:
    """Change a number in a local header, the directory, or the end record."""
    raw = bytearray(content.head)
    magic, span = rng.choice(
        (
            (b"PK\x03\x04", 30),
            (b"PK\x01\x02", 46),
            (b"PK\x05\x06", 22),
            (b"PK\x06\x06", 56),
            (b"PK\x06\x07", 20),
        )
    )
    spots = []
    at = raw.find(magic)
    while at >= 0:
        spots.append(at)
        at = raw.find(magic, at + 4)
    if not spots:
        magic, span = b"PK\x03\x04", 30
        spots = [0]
    at = rng.choice(spots) + rng.randrange(4, span)
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((*INTEGERS, len(raw))) % (1 << 8 * width)
    raw[at : at + width] = value.to_bytes(width, "little")
    return replace(content, head=bytes(raw))
