"""SentencePiece models: the few fields of the protocol buffer that a GGUF header repeats.

::

    ModelProto      1: piece {1: text, 2: score (float), 3: type}   repeated
                    2: trainer_spec {3: model_type}
                    3: normalizer_spec {2: precompiled_charsmap, 3: add_dummy_prefix,
                                        4: remove_extra_whitespaces}

Piece types (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte) are the numbers of
`tokenizer.ggml.token_type` too. Source: google/sentencepiece src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from diffquant.core.errors import MalformedFile

__all__ = ["Spiece", "read_spiece"]

_UNIGRAM = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Spiece:
    """A SentencePiece model's pieces, in order, and how it normalizes text."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    charsmap: bytes
    add_prefix: bool
    collapse_spaces: bool
    is_unigram: bool


def read_spiece(raw: bytes, name: str) -> Spiece:
    """Read spiece.model.

    Args:
        raw: the file.
        name: what messages call it.

    Raises:
        MalformedFile: not such a file, or cut off.
    """
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    charsmap, prefix, collapse, kind = b"", True, True, _UNIGRAM
    try:
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                texts.append(_bytes(piece.get(1, b"")).decode("utf-8"))
                scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
                types.append(_int(piece.get(3, 1)))
            elif number == 2 and isinstance(value, bytes):
                kind = _int(dict(_fields(value)).get(3, _UNIGRAM))
            elif number == 3 and isinstance(value, bytes):
                spec = dict(_fields(value))
                charsmap = _bytes(spec.get(2, b""))
                prefix, collapse = bool(spec.get(3, 1)), bool(spec.get(4, 1))
    except (ValueError, struct.error) as error:
        raise MalformedFile(f"{name}: not a SentencePiece model: {error}") from None
    if not texts or any(not 1 <= one <= 6 for one in types):
        raise MalformedFile(f"{name}: not a SentencePiece model: no pieces, or of unknown types")
    return Spiece(
        tuple(texts), tuple(scores), tuple(types), charsmap, prefix, collapse, kind == _UNIGRAM
    )


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk one message: (field number, number or bytes)."""
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(raw, position)
            yield number, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
        if wire == _BYTES:
            length, position = _varint(raw, position)
        elif not length:
            raise ValueError(f"wire type {wire} at byte {position}")
        if length > len(raw) - position:
            raise ValueError(f"field of {length} bytes at byte {position} runs past the end")
        yield number, raw[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(raw) and shift < 64:
        byte = raw[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError(f"number at byte {position} does not end")
