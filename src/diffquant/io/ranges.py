"""A file on a server, read by ranges: blocks are kept, neighbours are fetched together.

The first request asks for 256 KiB: the header of most checkpoints, and with it the file's size and
ETag. What is asked for later is fetched in blocks of 64 KiB. Small tensors of one sort (markers,
scalars) are read one after the other by everyone, so the first of them fetches all of its sort:
near ones in one request, far ones over several connections at once.

What the server says is checked: the range it sends is the one asked for, the size stays, and so
does the ETag; a file that was replaced meanwhile is an error, not a mixture of two.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException

from diffquant.core.errors import CheckpointError, RemoteError
from diffquant.io.transport import Response, Transport, shown

__all__ = ["RangeReader", "Resource"]

_LOG = logging.getLogger(__name__)
_BLOCK = 64 << 10
_FIRST_NBYTES = 4 * _BLOCK
_KEPT_BLOCKS = 4096  # 256 MiB
_LARGE_NBYTES = 1 << 20
_NEAR_NBYTES = 4 * _BLOCK
_AT_ONCE = 8
_MAX_SPANS = 4000
_MAX_WHOLE_NBYTES = 8 << 20
_MAX_SIZE = 1 << 50
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
_EXPIRED = {401, 403, 404, 410}


def _explain_plainly(response: Response) -> CheckpointError:
    said = {
        401: "the server asks for credentials",
        403: "the server refuses: forbidden",
        404: "no such file on the server",
        429: "the server has had too many requests: wait, and try again",
    }.get(response.status, f"the server answers {response.status}")
    return RemoteError(said, path=shown(response.url), status=response.status)


@dataclass(frozen=True, slots=True)
class Resource:
    """Where a file lies and how to ask for it.

    Attributes:
        url: http or https.
        name: what errors call it.
        private: headers for the host of `url` alone.
        explain: turns an answer that is no success into the error to raise.
    """

    url: str
    name: object
    private: Mapping[str, str] = field(default_factory=dict)
    explain: Callable[[Response], CheckpointError] = _explain_plainly


class RangeReader:
    """Reads any bytes of a remote file, from any thread.

    Attributes:
        size: of the file, in bytes.
        hops: headers of the first answer and of what redirected to it; see Response.
    """

    def __init__(self, resource: Resource, transport: Transport) -> None:
        """Fetch the first bytes.

        Raises:
            RemoteError: the server takes no ranges, or its answers do not fit together.
            CheckpointError: what `resource.explain` makes of a refusal.
        """
        self.resource = resource
        self._transport = transport
        self._blocks: dict[int, bytes] = {}
        self._sorts: list[frozenset[int]] = []
        self._extents: dict[int, int] = {}
        self._lock = threading.RLock()
        self._url = resource.url
        self._etag = ""
        self.size = -1
        self.hops: Mapping[str, str] = {}
        self._keep(0, self._fetch(0, _FIRST_NBYTES))

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes that lie inside the file.

        Raises:
            RemoteError: the server fails, or the file has changed since it was opened.
        """
        if nbytes > _LARGE_NBYTES:
            return self._read_large(offset, nbytes)
        if not nbytes:
            return b""
        with self._lock:
            self._load_sort(offset)
            first, last = offset // _BLOCK, (offset + nbytes - 1) // _BLOCK
            missing = [one for one in range(first, last + 1) if one not in self._blocks]
            found = {one: self._blocks[one] for one in range(first, last + 1) if one not in missing}
            if missing:
                begin = missing[0] * _BLOCK
                raw = self._fetch(begin, min((missing[-1] + 1) * _BLOCK, self.size))
                self._keep(begin, raw)
                found |= _cut(begin, raw)
        joined = b"".join(found[one] for one in range(first, last + 1))
        return joined[offset - first * _BLOCK :][:nbytes]

    def move(self, resource: Resource) -> None:
        """Ask elsewhere for the same file from now on: its address at a fixed commit."""
        if self._url == self.resource.url:
            self._url = resource.url
        self.resource = resource

    def expect(self, sorts: Iterable[Mapping[int, int]]) -> None:
        """Announce small extents, offset -> bytes, one mapping for what is read together."""
        with self._lock:
            for extents in sorts:
                self._sorts.append(frozenset(extents))
                self._extents |= extents

    def _read_large(self, offset: int, nbytes: int) -> bytes:
        """Bytes that are not worth keeping; what is kept of their beginning is not asked again."""
        head = bytearray()
        with self._lock:
            while (block := self._blocks.get((offset + len(head)) // _BLOCK)) is not None:
                head += block[(offset + len(head)) % _BLOCK :]
                if len(head) >= nbytes or len(block) < _BLOCK:
                    break
        if len(head) >= nbytes:
            return bytes(head[:nbytes])
        return bytes(head) + self._fetch(offset + len(head), offset + nbytes)

    def _keep(self, begin: int, raw: bytes) -> None:
        self._blocks |= _cut(begin, raw)
        while len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.pop(next(iter(self._blocks)))

    def _load_sort(self, offset: int) -> None:
        """Fetch the blocks of every extent that is read together with the one at `offset`."""
        sort = next((one for one in self._sorts if offset in one), None)
        if sort is None or offset // _BLOCK in self._blocks:
            return
        self._sorts.remove(sort)
        spans = self._spans(sort)
        if len(spans) > _MAX_SPANS:
            raise RemoteError(
                f"{len(sort)} small tensors lie in {len(spans)} places, more than {_MAX_SPANS} "
                "requests are not sent for them: download it (diffquant download)",
                path=self.resource.name,
            )
        if len(spans) < 2:
            return
        _LOG.info("%s: %d small tensors in %d ranges", self.resource.name, len(sort), len(spans))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            fetched = list(pool.map(lambda span: self._fetch(*span), spans))
        for (begin, _), raw in zip(spans, fetched, strict=True):
            self._keep(begin, raw)

    def _spans(self, sort: frozenset[int]) -> list[tuple[int, int]]:
        """Whole blocks around the extents of a sort, near ones joined, those kept left out."""
        spans: list[tuple[int, int]] = []
        for offset in sorted(sort):
            begin = offset // _BLOCK * _BLOCK
            end = min(-(-(offset + self._extents[offset]) // _BLOCK) * _BLOCK, self.size)
            if all(block in self._blocks for block in range(begin // _BLOCK, -(-end // _BLOCK))):
                continue
            if spans and begin - spans[-1][1] <= _NEAR_NBYTES:
                spans[-1] = spans[-1][0], max(end, spans[-1][1])
            else:
                spans.append((begin, end))
        return spans

    def _fetch(self, begin: int, end: int) -> bytes:
        """Bytes from the server; a cut connection goes on where it was cut."""
        found = bytearray()
        fruitless = 0
        waits = self._transport.patience.waits_s
        while True:
            before = len(found)
            problem: Exception | None = None
            with self._ask(begin + before, end) as response:
                try:
                    if response.status == 200 and self.size < 0:
                        return self._take_whole(response)
                    stop = self._check(response, begin + before, end)
                    for chunk in response.chunks(stop - begin - before):
                        found += chunk
                except (OSError, HTTPException) as error:
                    problem = error
            end = min(end, self.size) if self.size >= 0 else end
            if begin + len(found) >= end:
                return bytes(found)
            fruitless = 0 if len(found) > before else fruitless + 1
            if fruitless > len(waits):
                raise RemoteError(
                    f"the connection was cut {fruitless} times at byte {begin + before}: "
                    f"{problem or 'the server sent less than it announced'}",
                    path=self.resource.name,
                ) from problem
            if fruitless:
                self._transport.pause(waits[fruitless - 1])

    def _ask(self, begin: int, end: int) -> Response:
        """Send a range request; a signed URL that expired is asked for again."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if self._etag and not self._etag.startswith("W/"):
            headers["If-Range"] = self._etag
        url = self._url
        response = self._send(url, headers)
        if response.status in _EXPIRED and url != self.resource.url:
            with response:
                pass
            response = self._send(self.resource.url, headers)
        return response

    def _send(self, url: str, headers: Mapping[str, str]) -> Response:
        private = self.resource.private if url == self.resource.url else {}
        return self._transport.get(url, headers, private=private, where=self.resource.name)

    def _check(self, response: Response, begin: int, end: int) -> int:
        """Check an answer; return where its bytes end. The first one tells size and ETag.

        Raises:
            RemoteError: it is not what was asked for.
        """
        name = self.resource.name
        if response.status == 416 and self.size < 0:
            self.size = 0  # there is no byte 0: the file is empty
            return 0
        if response.status == 200:
            raise self._changed()
        if response.status != 206:
            raise self.resource.explain(response)
        _check_encoding(response, name)
        text = response.headers.get("Content-Range", "")
        said = _CONTENT_RANGE.fullmatch(text)
        first, last, size = (int(one) for one in said.groups()) if said else (-1, -1, -1)
        if first != begin or not first <= last < min(end, size) or size > _MAX_SIZE:
            raise RemoteError(
                f"bytes {begin} to {end - 1} were asked for, the server sends {text!r:.60}",
                path=name,
            )
        if response.length is not None and response.length != last - first + 1:
            raise RemoteError(
                f"the server announces {response.length} bytes for {text!r:.60}", path=name
            )
        etag = response.headers.get("ETag", "")
        if self.size < 0:
            self.size, self._etag, self.hops = size, etag, response.hops
        elif size != self.size or etag != self._etag:
            raise self._changed()
        self._url = response.url
        return last + 1

    def _take_whole(self, response: Response) -> bytes:
        """Take the whole of a small file where the server sends no ranges."""
        _check_encoding(response, self.resource.name)
        try:
            raw = response.body(_MAX_WHOLE_NBYTES)
        except ValueError as error:
            raise RemoteError(
                f"the server takes no range requests and would send the whole file ({error}): "
                "download it (diffquant download)",
                path=self.resource.name,
            ) from None
        self.size, self.hops = len(raw), response.hops
        return raw

    def _changed(self) -> RemoteError:
        return RemoteError(
            "the file was replaced on the server while it was read: try again",
            path=self.resource.name,
        )


def _check_encoding(response: Response, name: object) -> None:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RemoteError("the server compresses what it was asked to send as it is", path=name)


def _cut(begin: int, raw: bytes) -> dict[int, bytes]:
    """Bytes as numbered blocks; `begin` is a whole block."""
    return {(begin + at) // _BLOCK: raw[at : at + _BLOCK] for at in range(0, len(raw), _BLOCK)}
