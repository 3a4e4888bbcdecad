"""fetch(): one remote file to disk, going on where it was cut, kept only when its checksum fits.

The bytes go to `<name>.<content id>.part` beside the target, at their own offsets; the content id
(the first of the checksum) keeps parts of two versions apart. What is there already is read and
hashed, not fetched. A part outlives a cut, Ctrl-C and a full disk; one whose checksum is wrong is
removed.

`huggingface_hub.hf_hub_download` is not used: it compares sizes and no checksum, a broken download
does not resume (its temporary name has a random part), and plain HTTP ends at 50 GB.
Source: huggingface/huggingface_hub@ee0a4510f src/huggingface_hub/file_download.py (`http_get`,
`_download_to_tmp_and_move`), constants.py (MAX_HTTP_DOWNLOAD_SIZE).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, Protocol

from diffquant.core.errors import RemoteError, VerificationError
from diffquant.core.progress import Progress
from diffquant.io.ranges import Resource
from diffquant.io.remote_path import RemoteEntry
from diffquant.io.transport import Response, Transport

__all__ = ["Fetched", "checksum_name", "fetch", "fits", "part_path"]

_CHUNK_NBYTES = 8 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What it took: bytes that were in the part, bytes that came, and whether it began again."""

    kept_nbytes: int
    sent_nbytes: int
    restarted: bool


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def checksum_name(entry: RemoteEntry) -> str:
    """What an entry can be checked by: "sha256" (LFS), "git sha1" (small files), or ""."""
    return "sha256" if entry.sha256 else "git sha1" if entry.blob_sha1 else ""


def part_path(target: Path, entry: RemoteEntry, version: str = "") -> Path:
    """Where the bytes of an unfinished file lie."""
    return target.with_name(f"{target.name}.{_content_id(entry, version)}.part")


def fits(path: Path, entry: RemoteEntry, progress: Progress) -> bool:
    """Tell whether a file has the size and the checksum of an entry."""
    if path.stat().st_size != entry.nbytes:
        return False
    digest = _new_hash(entry)
    with path.open("rb") as file:
        for chunk in _chunks_of(file):
            digest.update(chunk)
            progress.advance(len(chunk), path.name)
    return digest.hexdigest() == _expected(entry)


def fetch(
    resource: Resource,
    entry: RemoteEntry,
    target: Path,
    *,
    transport: Transport,
    progress: Progress,
    version: str = "",
) -> Fetched:
    """Download a file; nothing exists under the target's name before its checksum was compared.

    Args:
        resource: where it lies.
        entry: its size and checksum.
        target: replaced when all is there.
        transport: sends the requests.
        progress: told of every byte, those of an old part too.
        version: tells two contents of a file without checksum apart (its ETag).

    Raises:
        RemoteError: the server keeps failing, or sends another file; the part stays.
        VerificationError: the checksum is wrong; the part is removed.
        OSError: the disk.
    """
    part = part_path(target, entry, version)
    digest = _new_hash(entry)
    with part.open("r+b" if part.exists() else "x+b") as file:
        kept = 0
        if os.fstat(file.fileno()).st_size > entry.nbytes:
            file.truncate(0)
        for chunk in _chunks_of(file):
            digest.update(chunk)
            kept += len(chunk)
            progress.advance(len(chunk), target.name)
        stream = _Stream(resource, entry, transport, offset=kept)
        for chunk in stream.chunks():
            if stream.restarted_now:
                progress.advance(-file.tell(), target.name)
                file.seek(0)
                file.truncate()
                digest = _new_hash(entry)
            file.write(chunk)
            digest.update(chunk)
            progress.advance(len(chunk), target.name)
        file.flush()
        os.fsync(file.fileno())
    found, expected = digest.hexdigest(), _expected(entry)
    if expected and found != expected:
        part.unlink()
        raise VerificationError(
            f"{target}: {checksum_name(entry)} is {found}, {expected} expected: damaged on the "
            "way, what had come is removed; run the same command again"
        )
    part.replace(target)
    return Fetched(kept, stream.sent_nbytes, stream.restarted)


class _Stream:
    """The bytes of a file from an offset on, over as many requests as it takes."""

    def __init__(
        self, resource: Resource, entry: RemoteEntry, transport: Transport, *, offset: int
    ) -> None:
        self.sent_nbytes = 0
        self.restarted = False
        self.restarted_now = False
        self._resource = resource
        self._entry = entry
        self._transport = transport
        self._offset = offset

    def chunks(self) -> Iterator[bytes]:
        """Yield what is left; `restarted_now` says of a chunk that it is the first of all again."""
        fruitless = 0
        waits = self._transport.patience.waits_s
        while self._offset < self._entry.nbytes:
            before = self.sent_nbytes
            problem: Exception | None = None
            headers = {"Range": f"bytes={self._offset}-"} if self._offset else {}
            with self._transport.get(
                self._resource.url,
                headers,
                private=self._resource.private,
                where=self._resource.name,
            ) as response:
                self._check(response)
                try:
                    for chunk in response.chunks(self._entry.nbytes - self._offset):
                        self._offset += len(chunk)
                        self.sent_nbytes += len(chunk)
                        yield chunk
                        self.restarted_now = False
                except (OSError, HTTPException) as error:
                    problem = error
            if self._offset >= self._entry.nbytes:
                return
            fruitless = 0 if self.sent_nbytes > before else fruitless + 1
            if fruitless > len(waits):
                raise RemoteError(
                    f"the connection was cut {fruitless} times at byte {self._offset} of "
                    f"{self._entry.nbytes}: {problem or 'less came than was announced'}",
                    path=self._resource.name,
                ) from problem
            if fruitless:
                self._transport.pause(waits[fruitless - 1])

    def _check(self, response: Response) -> None:
        """Check that an answer goes on where we are, in the file that we know.

        Raises:
            RemoteError: it does not.
        """
        name = self._resource.name
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RemoteError("the server compresses what it was asked to send as it is", path=name)
        if response.status == 206 and self._offset:
            said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if said is None or (int(said[1]), int(said[2])) != (self._offset, self._entry.nbytes):
                raise RemoteError(
                    f"byte {self._offset} of {self._entry.nbytes} was asked for, the server sends "
                    f"{response.headers.get('Content-Range', '')!r:.60}",
                    path=name,
                )
            return
        if response.status != 200:
            raise self._resource.explain(response)
        if response.length is not None and response.length != self._entry.nbytes:
            raise RemoteError(
                f"the server sends {response.length} bytes, {self._entry.nbytes} are listed: the "
                "file was replaced, run the same command again",
                path=name,
            )
        if self._offset:  # no ranges: from the beginning, once more
            self.restarted = self.restarted_now = True
            self._offset = 0


def _content_id(entry: RemoteEntry, version: str) -> str:
    known = entry.sha256 or entry.blob_sha1
    return known[:8] or hashlib.sha256(f"{version} {entry.nbytes}".encode()).hexdigest()[:8]


def _expected(entry: RemoteEntry) -> str:
    return entry.sha256 or entry.blob_sha1


def _new_hash(entry: RemoteEntry) -> _Hash:
    """SHA-256, or git's object id: SHA-1 over a header and the content."""
    if entry.sha256 or not entry.blob_sha1:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % entry.nbytes, usedforsecurity=False)


def _chunks_of(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_NBYTES):
        yield chunk
