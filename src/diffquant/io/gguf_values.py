"""Typed metadata values of GGUF: what a reader returns and what a writer takes.

A reader turns scalars into str, bool, int or float, and arrays into `GgufArray`, which stays raw
bytes until somebody looks inside: a tokenizer's 250 000 strings cost little to skip. A writer
takes

======================  ==================================================
str, bool, float        STRING, BOOL, FLOAT32
int                     UINT32 where it fits, else INT32, UINT64, INT64
tuple or list           ARRAY of STRING, BOOL, FLOAT32, INT32 (INT64 where needed)
GgufArray               the same bytes again
GgufValue(type, value)  exactly that type; a tuple or list makes an ARRAY of it
======================  ==================================================

Source: ggml-org/ggml docs/gguf.md (value types); gguf-py 0.19.0 gguf/constants.py:4157-4170 (ids).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from diffquant.core.errors import PlanMismatch

__all__ = [
    "ARRAY_ID",
    "CODES",
    "TYPE_IDS",
    "GgufArray",
    "GgufValue",
    "encode_string",
    "encode_value",
]

ARRAY_ID = 9
TYPE_IDS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
CODES = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "?",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}


@dataclass(frozen=True, slots=True)
class GgufValue:
    """A value with its exact type: GgufValue("u32", 2), GgufValue("i32", (320, 4, 3, 3)).

    Attributes:
        type: a TYPE_IDS name; of the elements where `value` is an array.
        value: str, bool, int or float; or a tuple, list or GgufArray of them.
    """

    type: str
    value: Any


class GgufArray(Sequence[Any]):
    """An array in a GGUF header, decoded when an element is first asked for."""

    __slots__ = ("_count", "_values", "raw", "type")

    def __init__(self, type_name: str, count: int, raw: bytes) -> None:
        self.type = type_name
        self.raw = raw
        self._count = count
        self._values: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...  # noqa: ANN401

    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._decoded())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GgufArray):
            return (self.type, len(self), self.raw) == (other.type, len(other), other.raw)
        return isinstance(other, list | tuple) and self._decoded() == tuple(other)

    def __hash__(self) -> int:
        return hash((self.type, self.raw))

    def __repr__(self) -> str:
        head = ", ".join(repr(item) for item in self[:4]) if self._count <= 64 else ""
        return f"GgufArray({self.type}, {self._count} items{': ' + head if head else ''})"

    def _decoded(self) -> tuple[Any, ...]:
        if self._values is None:
            if self.type == "str":
                self._values = tuple(self._strings())
            else:
                self._values = struct.unpack(f"<{self._count}{CODES[self.type]}", self.raw)
        return self._values

    def _strings(self) -> Iterator[str]:
        position = 0
        for _ in range(self._count):
            (nbytes,) = struct.unpack_from("<Q", self.raw, position)
            position += 8 + nbytes
            # Tokenizers hold byte fragments; those need not be whole characters.
            yield self.raw[position - nbytes : position].decode("utf-8", "replace")


def encode_string(text: str) -> bytes:
    """Return a GGUF string: u64 bytes, then UTF-8 without a terminator."""
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def encode_value(key: str, value: Any) -> bytes:  # noqa: ANN401 - the table above
    """Return the value's type id and bytes as they follow the key in a header.

    Raises:
        PlanMismatch: no type, or not the given one, can hold the value.
    """
    if isinstance(value, GgufArray):
        value = GgufValue(value.type, value)
    if not isinstance(value, GgufValue):
        value = GgufValue(_natural_type(key, value), value)
    type_id = TYPE_IDS.get(value.type)
    if type_id is None:
        raise PlanMismatch(
            f"metadata {key!r}: unknown type {value.type!r} (known: {', '.join(TYPE_IDS)})"
        )
    try:
        if isinstance(value.value, GgufArray) and value.value.type == value.type:
            raw = value.value.raw
        elif isinstance(value.value, list | tuple | GgufArray):
            raw = b"".join(_encode_scalar(value.type, item) for item in value.value)
        else:
            return struct.pack("<I", type_id) + _encode_scalar(value.type, value.value)
        return struct.pack("<IIQ", ARRAY_ID, type_id, len(value.value)) + raw
    except (struct.error, AttributeError, OverflowError) as error:
        raise PlanMismatch(
            f"metadata {key!r}: {value.value!r:.80} is no {value.type} ({error})"
        ) from None


def _encode_scalar(type_name: str, value: Any) -> bytes:  # noqa: ANN401
    if type_name == "str":
        return encode_string(value)
    return struct.pack("<" + CODES[type_name], value)


def _natural_type(key: str, value: object) -> str:
    items = value if isinstance(value, list | tuple) else (value,)
    if items and all(isinstance(item, str) for item in items):
        return "str"
    if items and all(isinstance(item, bool) for item in items):
        return "bool"
    if items and all(type(item) is int for item in items):
        candidates = ("u32", "i32", "u64", "i64") if items is not value else ("i32", "i64", "u64")
        for name in candidates:
            bits = int(name[1:])
            low, high = (0, 2**bits) if name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
            if all(low <= item < high for item in items):
                return name
    if items and all(isinstance(item, float) for item in items):
        return "f32"
    raise PlanMismatch(
        f"metadata {key!r}: no GGUF type for {value!r:.80}, give a GgufValue with one"
    )
