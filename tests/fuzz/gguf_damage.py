"""Seeded damage to GGUF files: fields at their places, and whole headers written anew."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

from contents import INTEGERS, Content, damage_bytes
from json_damage import NAMES
from safetensors_damage import renamed, reshaped


def _string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _scalar(rng: random.Random) -> bytes:
    """A metadata value of any type, type id first."""
    kind = rng.choice((0, 4, 5, 6, 7, 8, 9, 9, 10, 12, 13, 99))
    if kind == 8:
        return struct.pack("<I", 8) + _string(rng.choice(NAMES))
    if kind == 9:
        inner = rng.choice((4, 5, 8, 9, 7))
        count = rng.choice((0, 1, 3, 2**31, 2**61, 2**64 - 1))
        items = b"".join(_string("x") if inner == 8 else bytes(4) for _ in range(min(count, 3)))
        return struct.pack("<IIQ", 9, inner, count) + items
    width = {0: 1, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 12: 8}.get(kind, 4)
    return struct.pack("<I", kind) + rng.choice((b"\xff", b"\0", b"\x7f")) * width


_KEYS = (
    "general.architecture", "general.alignment", "general.file_type", "general.type",
    "general.quantization_version", "comfy.gguf.orig_shape.blocks.0.attn.qkv.weight",
    "comfy.gguf.orig_shape.nothing", "diffquant.config", "imatrix.chunk_count",
    "imatrix.datasets", "imatrix.chunk_size", "split.count", *NAMES,
)  # fmt: skip


def damage_gguf(content: Content, rng: random.Random, canary: Path) -> Content:
    """Insert a metadata pair, or change one field of the header at its place."""
    raw = bytearray(content.head)
    if len(raw) < 24 or rng.random() < 0.2:
        return damage_bytes(content, rng, canary)
    _, tensors, pairs = struct.unpack_from("<IQQ", raw, 4)
    kind = rng.randrange(6)
    if kind == 0:
        field = rng.choice((4, 8, 16))
        struct.pack_into("<Q", raw, field, rng.choice(INTEGERS))
    elif kind in (1, 2):
        pair = _string(rng.choice(_KEYS)) + _scalar(rng)
        raw[24:24] = pair + bytes(-len(pair) % 32)[: 0 if rng.random() < 0.5 else None]
        struct.pack_into("<Q", raw, 16, pairs + 1)
    elif kind == 3:
        extra = _string(rng.choice(NAMES)) + _tensor_info(rng)
        raw[24:24] = extra
        struct.pack_into("<QQ", raw, 8, tensors + 1, 0)
    else:
        spots = _find_names(raw)
        if spots:
            at = rng.choice(spots)
            length = struct.unpack_from("<Q", raw, at)[0]
            info = at + 8 + length
            if kind == 4 and info + 4 < len(raw):
                raw[info : info + 24] = _tensor_info(rng)[:24]
            else:
                new = rng.choice(NAMES)
                raw[at:info] = _string(new)
    return replace(content, head=bytes(raw))


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _skip_value(raw: bytes, at: int, kind: int) -> int:
    if kind == 8:
        return at + 8 + int(struct.unpack_from("<Q", raw, at)[0])
    if kind == 9:
        inner, count = struct.unpack_from("<IQ", raw, at)
        at += 12
        if count > 1000:
            raise ValueError("damaged before")
        for _ in range(count):
            at = _skip_value(raw, at, inner)
        return at
    return at + _WIDTHS[kind]


def rebuild_gguf(content: Content, rng: random.Random, canary: Path) -> Content:
    """Another file whose header can be read: pairs and tensors exchanged, renamed, retyped."""
    raw = content.head
    _, n_tensors, n_pairs = struct.unpack_from("<IQQ", raw, 4)
    if n_tensors + n_pairs > 1000:
        raise ValueError("damaged before")
    at, pairs, infos = 24, [], []
    for _ in range(n_pairs):
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        stop = _skip_value(raw, end + 4, struct.unpack_from("<I", raw, end)[0])
        pairs.append((raw[at:end], raw[end:stop]))
        at = stop
    for _ in range(n_tensors):
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        n_dims = struct.unpack_from("<I", raw, end)[0]
        dims = struct.unpack_from(f"<{n_dims}Q", raw, end + 4)
        type_id, offset = struct.unpack_from("<IQ", raw, end + 4 + 8 * n_dims)
        infos.append((raw[at + 8 : end], list(dims), type_id, offset))
        at = end + 16 + 8 * n_dims
    data = raw[-(-at // 32) * 32 :]
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(7)
        if kind == 0:
            pairs.append((_string(rng.choice(_KEYS)), _scalar(rng)))
        elif kind == 1 and pairs:
            which = rng.randrange(len(pairs))
            pairs[which] = (pairs[which][0], _scalar(rng))
        elif kind == 2 and pairs:
            pairs[rng.randrange(len(pairs))] = (_string(rng.choice(_KEYS)), rng.choice(pairs)[1])
        elif not infos:
            break
        else:
            which = rng.randrange(len(infos))
            name, dims, type_id, offset = infos[which]
            if kind == 3:
                text = renamed(name.decode("utf-8", "replace"), rng)
                infos[which] = (text.encode("utf-8", "replace"), dims, type_id, offset)
            elif kind == 4:
                infos[which] = (name, dims, rng.choice((0, 1, 2, 8, 20, 24, 30, 12, 40)), offset)
            elif kind == 5:
                infos[which] = (name, reshaped(dims, rng)[:8], type_id, offset)
            else:
                del infos[which]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs))
    head += b"".join(key + value for key, value in pairs)
    for name, dims, type_id, offset in infos:
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
    return Content(head + bytes(-len(head) % 32) + data, content.zeros)


def _tensor_info(rng: random.Random) -> bytes:
    n_dims = rng.choice((0, 1, 2, 3, 4, 5, 8, 9, 2**31))
    dims = [rng.choice((0, 1, 32, 256, 2**31, 2**32, 2**62, 2**64 - 1)) for _ in range(n_dims % 10)]
    type_id = rng.choice((0, 1, 2, 4, 8, 12, 15, 16, 30, 31, 36, 39, 40, 99, 2**32 - 1))
    offset = rng.choice((0, 1, 32, 64, 2**20, 2**63, 2**64 - 32))
    return struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, type_id, offset)


def _find_names(raw: bytearray) -> list[int]:
    """Where lengths of names seem to stand."""
    found = []
    at = raw.find(b"blocks.")
    while at >= 8 and len(found) < 40:
        if 0 < struct.unpack_from("<Q", raw, at - 8)[0] < 200:
            found.append(at - 8)
        at = raw.find(b"blocks.", at + 1)
    return found
