"""A file as it is held while it is damaged, and damage that knows nothing of its structure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

HEAD_NBYTES = 1 << 18  # bytes of a file that are held and damaged; what follows is zeros


@dataclass(frozen=True)
class Content:
    """A file: its first bytes, and how many zeros follow them."""

    head: bytes
    zeros: int = 0

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(self.head)
            file.truncate(len(self.head) + self.zeros)


INTEGERS = (
    0, 1, 2, 3, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
)  # fmt: skip


def spot(size: int, rng: random.Random) -> int:
    """A position, mostly where headers are."""
    if not size:
        return 0
    return rng.randrange(min(size, 2048)) if rng.random() < 0.75 else rng.randrange(size)


def damage_bytes(content: Content, rng: random.Random, _canary: Path) -> Content:
    raw = bytearray(content.head)
    zeros = content.zeros
    kind = rng.randrange(9)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            if raw:
                raw[spot(len(raw), rng)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        raw, zeros = raw[: spot(len(raw) + 1, rng)], 0
    elif kind == 2:
        zeros = rng.choice((0, max(zeros - 1, 0), zeros // 2, zeros + 1, zeros + 4096))
    elif kind == 3:
        raw += rng.randbytes(rng.choice((1, 7, 8, 64, 4096)))
    elif kind == 4:
        width = rng.choice((1, 2, 4, 8))
        at = spot(max(len(raw) - width, 1), rng)
        value = rng.choice((*INTEGERS, len(raw), len(raw) + zeros)) % (1 << 8 * width)
        raw[at : at + width] = value.to_bytes(width, "little")
    elif kind == 5:
        at, length = spot(len(raw), rng), rng.choice((1, 4, 8, 64, 512))
        raw[at : at + length] = bytes(length)
    elif kind == 6:
        at, to, length = spot(len(raw), rng), spot(len(raw), rng), rng.choice((1, 8, 64, 512))
        raw[to:to] = raw[at : at + length]
    elif kind == 7:
        at = spot(len(raw), rng)
        del raw[at : at + rng.choice((1, 2, 8, 64))]
    else:
        raw = bytearray(rng.randbytes(rng.choice((0, 1, 3, 8, 9, 64, 2000))))
        zeros = 0
    return Content(bytes(raw), zeros)
