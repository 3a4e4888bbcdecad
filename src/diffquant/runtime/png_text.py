"""The text chunks of a PNG, and nothing else of it: no pixel is decoded.

::

    8 bytes      signature
    per chunk    length (4 bytes, big endian), type (4), data (length), CRC-32 of type and data (4)
      tEXt       keyword, 0, Latin-1
      zTXt       keyword, 0, method 0, zlib of Latin-1
      iTXt       keyword, 0, compressed?, method 0, language, 0, translated keyword, 0, UTF-8

A picture from a stranger is hostile: lengths are checked against the file, texts are limited before
and after they are inflated. Source: PNG specification, third edition, sections 5 and 11.3.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffquant.core.errors import MalformedFile, TruncatedFile, UsageError

__all__ = ["png_texts"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT_NBYTES = 4 << 20  # of one chunk, inflated; ComfyUI's largest graphs have some hundred KiB
_MAX_CHUNKS = 100_000
_KINDS = (b"tEXt", b"zTXt", b"iTXt")


def png_texts(path: Path) -> dict[str, str]:
    """Read the texts of a PNG by keyword; of two with one keyword the first.

    Raises:
        UsageError: no such file, or no PNG.
        MalformedFile, TruncatedFile: a PNG that contradicts itself, or texts of absurd size.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such picture")
    found: dict[str, str] = {}
    with path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise UsageError(f"{path}: not a PNG, which alone carries parameters")
        for kind, data in _chunks(file, path):
            keyword, _, rest = data.partition(b"\0")
            found.setdefault(keyword.decode("latin-1"), _text(kind, rest, path))
    return found


def _chunks(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The text chunks; others are passed over."""
    size = path.stat().st_size
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise TruncatedFile("the PNG ends without its end chunk", path=path)
        length, kind = struct.unpack(">I4s", head)
        if length > size - file.tell() - 4:
            raise TruncatedFile(
                f"chunk {kind!r} of {length} bytes runs past the end of the file", path=path
            )
        if kind == b"IEND":
            return
        if kind not in _KINDS:
            file.seek(length + 4, 1)
            continue
        if length > _MAX_TEXT_NBYTES:
            raise MalformedFile(f"a text of {length} bytes in a PNG", path=path)
        data = file.read(length)
        if struct.unpack(">I", file.read(4))[0] != zlib.crc32(kind + data):
            raise MalformedFile(f"chunk {kind!r} is damaged: its CRC is wrong", path=path)
        yield kind, data
    raise MalformedFile(f"over {_MAX_CHUNKS} chunks", path=path)


def _text(kind: bytes, rest: bytes, path: Path) -> str:
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(rest[1:], path).decode("latin-1")
    compressed, rest = rest[:1] == b"\1", rest[2:]
    raw = rest.split(b"\0", 2)[-1]
    try:
        return (_inflated(raw, path) if compressed else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"a text chunk is not UTF-8: {error}", path=path) from None


def _inflated(raw: bytes, path: Path) -> bytes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(raw, _MAX_TEXT_NBYTES)
    except zlib.error as error:
        raise MalformedFile(f"a compressed text is damaged: {error}", path=path) from None
    if inflater.unconsumed_tail:
        raise MalformedFile(f"a text of over {_MAX_TEXT_NBYTES} bytes in a PNG", path=path)
    return text
