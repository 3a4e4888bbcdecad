"""Seeded damage to safetensors files: headers that lie, and good headers of nonsense."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from contents import INTEGERS, Content, damage_bytes
from json_damage import NAMES, damage_text


def damage_safetensors(content: Content, rng: random.Random, canary: Path) -> Content:
    length = int.from_bytes(content.head[:8], "little")
    raw, data = content.head[8 : 8 + length], content.head[8 + length :]
    try:
        header = json.loads(raw)
    except ValueError:
        return damage_bytes(content, rng, canary)
    kind = rng.randrange(6)
    if kind == 0:  # the markers and packed bytes, which a header does not show
        at = rng.randrange(max(len(data), 1))
        return _in_data(content, 8 + length, at, rng)
    if kind == 1:
        return _in_markers(content, header, 8 + length, rng)
    if kind == 2:
        header = _swap_entries(header, rng)
        text = json.dumps(header)
    else:
        text = damage_text(json.dumps(header), rng)
    encoded = text.encode("utf-8", "surrogatepass")
    said = len(encoded)
    if rng.random() < 0.1:
        said = rng.choice((said + 1, said - 1, 0, 100_000_001, *INTEGERS)) % 2**64
    return Content(said.to_bytes(8, "little") + encoded + data, content.zeros)


def _in_data(content: Content, start: int, at: int, rng: random.Random) -> Content:
    raw = bytearray(content.head)
    junk = rng.choice(
        (
            struct.pack("<f", float("nan")),
            struct.pack("<f", float("inf")),
            struct.pack("<d", 1e300),
            bytes(64),
            b"\xff" * 64,
            rng.randbytes(16),
        )
    )
    raw[start + at : start + at + len(junk)] = junk
    return replace(content, head=bytes(raw))


def _in_markers(
    content: Content, header: dict[str, Any], start: int, rng: random.Random
) -> Content:
    """Change the JSON inside a marker tensor; its length stays, as a header would demand."""
    small = [
        entry["data_offsets"]
        for key, entry in header.items()
        if isinstance(entry, dict) and entry.get("dtype") == "U8" and "data_offsets" in entry
    ]
    texts = [
        (begin, end)
        for begin, end in small
        if end - begin <= 4096 and content.head[start + begin : start + begin + 1] == b"{"
    ]
    if not texts:
        return _in_data(content, start, 0, rng)
    begin, end = rng.choice(texts)
    raw = bytearray(content.head)
    old = bytes(raw[start + begin : start + end])
    new = damage_text(old.decode("utf-8", "replace").rstrip("\0 "), rng)
    encoded = new.encode("utf-8", "surrogatepass")[: end - begin].ljust(end - begin)
    raw[start + begin : start + end] = encoded
    return replace(content, head=bytes(raw))


def _swap_entries(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Give tensors each other's names: every byte is in place, nothing means what it did."""
    keys = [key for key in header if key != "__metadata__"]
    if len(keys) < 2:
        return header
    one, other = rng.sample(keys, 2)
    if rng.random() < 0.5:
        header[one], header[other] = header[other], header[one]
    else:
        shape = header[one].get("shape")
        if isinstance(shape, list):
            header[one]["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [*shape, 0]))
    return header


def rebuild_safetensors(content: Content, rng: random.Random, _canary: Path) -> Content:
    """Another file that keeps the container's rules: only names, types and meanings are wrong."""
    length = int.from_bytes(content.head[:8], "little")
    header = json.loads(content.head[8 : 8 + length])
    data = content.head[8 + length :] + bytes(content.zeros)
    notes = header.pop("__metadata__", {})
    tensors = [
        (key, one["dtype"], one["shape"], data[one["data_offsets"][0] : one["data_offsets"][1]])
        for key, one in header.items()
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(tensors))
        key, dtype, shape, raw = tensors[at]
        kind = rng.randrange(9)
        if kind == 0:
            del tensors[at]
        elif kind == 1:
            tensors[at] = (renamed(key, rng), dtype, shape, raw)
        elif kind == 2:
            tensors[at] = (key, rng.choice(_ALIKE.get(dtype, (dtype,))), shape, raw)
        elif kind == 3:
            tensors[at] = (key, dtype, reshaped(shape, rng), raw)
        elif kind == 4:
            size = rng.choice((0, 1, 2, 40))
            text = damage_text('{"format": "nf4"}', rng).encode("utf-8", "replace")[:size]
            tensors.append((renamed(key, rng), "U8", [size], text.ljust(size)))
        elif kind == 5:
            other = rng.randrange(len(tensors))
            tensors[at] = (key, *tensors[other][1:])
        elif kind == 6 and notes:
            name = rng.choice(sorted(notes))
            notes[name] = damage_text(notes[name], rng)
        elif kind == 7:
            notes[rng.choice(_NOTES)] = damage_text(rng.choice(_NOTE_TEXTS), rng)
        else:
            tensors[at] = (key, dtype, [0, *shape[1:]], b"")
        if not tensors:
            break
    return _lay_out(tensors, notes)


_ALIKE = {
    "F16": ("BF16", "I16", "U16"), "BF16": ("F16", "I16"), "F32": ("I32", "U32"),
    "U8": ("I8", "F8_E4M3", "F8_E8M0", "BOOL"), "F8_E4M3": ("F8_E5M2", "U8", "I8"),
    "I8": ("U8", "F8_E4M3"), "I64": ("F64", "U64"),
}  # fmt: skip
_ENDINGS = (
    ".weight", ".scale_weight", ".weight_scale", ".comfy_quant", ".input_scale", ".alpha",
    ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".weight_scale_2", ".bias",
    ".lora_up.weight",
    ".lora_down.weight", ".dora_scale", ".hada_w1_a", ".lokr_w1", ".zero_point", ".scale",
    ".svd_up", ".SCB", ".nested_absmax", ".weight_format", ".diff", ".oft_blocks",
)  # fmt: skip
_NOTES = (
    "modelspec.architecture", "_quantization_metadata", "diffquant.config", "ss_network_dim",
    "ss_tag_frequency", "modelspec.hash_sha256", "sshs_model_hash", "ss_network_args", "format",
    "lora_adapter_metadata", "modelspec.thumbnail", "scaled_fp8", "", "\x1b[2J",
)  # fmt: skip
_NOTE_TEXTS = (
    '{"format_version": "1.0", "layers": {"blocks.0.attn.qkv": {"format": "float8_e4m3fn"}}}',
    '{"configs": {"unet/config.json": {"in_channels": 4, "block_out_channels": [320]}}}',
    '{"a": {"b": 1}}', '[1, 2]', '"x"', '4',
)  # fmt: skip


def renamed(key: str, rng: random.Random) -> str:
    """A name with another ending, another block number, a prefix, or none of the sort."""
    stem, _, _ = key.rpartition(".")
    return rng.choice(
        (
            (stem or key) + rng.choice(_ENDINGS),
            key + rng.choice(_ENDINGS),
            key.replace("0", rng.choice(("1", "7", "999999999999")), 1),
            rng.choice(("model.", "unet.", "lora_unet_", "transformer/", "vae.", "net.")) + key,
            rng.choice(NAMES),
        )
    )


def reshaped(shape: list[int], rng: random.Random) -> list[int]:
    """Another shape of as many elements."""
    total = 1
    for dim in shape:
        total *= dim
    return rng.choice(
        ([total], [1, *shape], [*shape, 1], shape[::-1], [total, 1], [1] * 20 + [total], [1, total])
    )


def _lay_out(tensors: list[tuple[str, str, list[int], bytes]], notes: dict[str, str]) -> Content:
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    data = b""
    for key, dtype, shape, raw in tensors:
        if key not in header:
            end = len(data) + len(raw)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
            data += raw
    encoded = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    raw = len(encoded).to_bytes(8, "little") + encoded + data
    head = raw.rstrip(b"\0")
    return Content(head, len(raw) - len(head))
