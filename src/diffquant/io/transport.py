"""HTTP GET as remote files need it: kept connections, redirects, retries, and a count of both.

What every request keeps to:

- credentials go to the host they were given for, never where it redirects (CDNs take signed URLs);
- from https nothing leads back to http;
- a server that is silent, or slower than `Patience.slowest`, is given up, not waited for;
- 408, 429 and 5xx are asked again after a pause, `Retry-After` honoured up to a minute;
- messages show URLs without their query: a signed one is a credential.

Proxies are those of the environment, certificates those of the system (SSL_CERT_FILE).
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from diffquant import __version__
from diffquant.core.errors import RemoteError

__all__ = ["PATIENCE", "Patience", "Response", "Transport", "is_offline", "shown"]

_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_RETRIED = {408, 429, 500, 502, 503, 504}
_MAX_RETRY_AFTER_S = 60.0
_CHUNK_NBYTES = 1 << 20
_DRAINED_NBYTES = 64 << 10
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # what a URL holds as it is; %xx stays %xx
_HEADERS = {"User-Agent": f"diffquant/{__version__}", "Accept-Encoding": "identity"}
# What a hub says on its redirect, before the CDN answers.
# huggingface/huggingface_hub@ee0a4510f src/huggingface_hub/constants.py (HUGGINGFACE_HEADER_X_*)
_HOP_HEADERS = ("X-Repo-Commit", "X-Error-Code")
_BROKEN = (OSError, http.client.HTTPException)
_FINAL = (ssl.SSLCertVerificationError, socket.gaierror)  # asking again will not help


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server.

    Attributes:
        connect_s: until it accepts a connection.
        silence_s: until its next byte.
        slowest: bytes per second below which a body is given up.
        waits_s: the pauses before each further try.
    """

    connect_s: float = 10.0
    silence_s: float = 30.0
    slowest: int = 16 << 10
    waits_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)


PATIENCE = Patience()


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE forbids the network.

    Source: huggingface/huggingface_hub@ee0a4510f src/huggingface_hub/constants.py
    (ENV_VARS_TRUE_VALUES).
    """
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def shown(url: str) -> str:
    """A URL as messages show it: without user, password, query and fragment."""
    split = urlsplit(url)
    return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"


class Response:
    """An answer whose body is not read yet; leaving the context gives the connection back.

    Attributes:
        url: what answered, after redirects.
        hops: what the hub said of commit and error, on a redirect or in the answer itself.
    """

    def __init__(
        self,
        raw: http.client.HTTPResponse,
        url: str,
        *,
        hops: Mapping[str, str],
        patience: Patience,
        finish: Callable[[], None],
    ) -> None:
        self.status = raw.status
        self.headers = raw.headers
        self.url = url
        self.hops = hops
        self.nbytes_read = 0
        self._raw = raw
        self._patience = patience
        self._finish = finish

    @property
    def length(self) -> int | None:
        """Bytes of body that the server announces, None where it does not."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    def chunks(self, limit: int) -> Iterator[bytes]:
        """Yield the body as it comes, at most `limit` bytes of it.

        Raises:
            OSError, HTTPException: the connection broke, or the body came too slowly.
        """
        deadline = time.monotonic() + self._patience.silence_s + limit / self._patience.slowest
        while self.nbytes_read < limit:
            chunk = self._raw.read1(min(_CHUNK_NBYTES, limit - self.nbytes_read))
            if not chunk:
                return
            self.nbytes_read += len(chunk)
            yield chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"under {self._patience.slowest} bytes per second")

    def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            OSError, HTTPException: the connection broke.
            ValueError: it has more than `limit` bytes.
        """
        if (self.length or 0) > limit:
            raise ValueError(f"{self.length} bytes, at most {limit} expected")
        found = b"".join(self.chunks(limit + 1))
        if len(found) > limit:
            raise ValueError(f"over {limit} bytes")
        if self.length is not None and len(found) < self.length:
            raise ConnectionError(f"cut after {len(found)} of {self.length} bytes")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()


class Transport:
    """Sends requests, from any thread; `requests` and `nbytes` count what went over the wire."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience or PATIENCE
        self.requests = 0
        self.nbytes = 0
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def get(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        private: Mapping[str, str] | None = None,
        where: object = None,
    ) -> Response:
        """Send a GET, follow redirects, ask again where that may help.

        Args:
            url: http or https.
            headers: sent to every host on the way.
            private: sent to the host of `url` only.
            where: what an error calls the thing that was asked for.

        Raises:
            RemoteError: offline, no connection, a bad redirect, or the server keeps failing.
        """
        where = where if where is not None else shown(url)
        if is_offline():
            raise RemoteError("HF_HUB_OFFLINE is set: only files in the cache are read", path=where)
        for wait_s in (*self.patience.waits_s, None):
            try:
                response = self._follow(url, headers or {}, private or {}, where)
            except _BROKEN as error:
                if wait_s is None or isinstance(error, _FINAL):
                    raise RemoteError(self._explain(error, url), path=where) from error
                self.pause(wait_s)
                continue
            except UnicodeError:  # a host that no name service could know
                raise RemoteError("no web address: its host is no name", path=where) from None
            if response.status not in _RETRIED or wait_s is None:
                return response
            with response:
                self.pause(_retry_after(response.headers.get("Retry-After", ""), wait_s))
        raise AssertionError("unreachable")

    def whole(
        self,
        url: str,
        *,
        limit: int,
        private: Mapping[str, str] | None = None,
        where: object = None,
    ) -> tuple[Response, bytes]:
        """An answer with its body, which must not have more than `limit` bytes.

        Raises:
            RemoteError: as `get`, or the body is cut again and again, or too long.
        """
        where = where if where is not None else shown(url)
        for wait_s in (*self.patience.waits_s, None):
            with self.get(url, private=private, where=where) as response:
                try:
                    return response, response.body(limit)
                except ValueError as error:
                    raise RemoteError(f"answer is too long: {error}", path=where) from None
                except _BROKEN as error:
                    if wait_s is None:
                        raise RemoteError(self._explain(error, url), path=where) from error
            self.pause(wait_s)
        raise AssertionError("unreachable")

    def pause(self, seconds: float) -> None:
        """Wait before asking again."""
        time.sleep(seconds)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connection in (one for ones in idle.values() for one in ones):
            connection.close()

    def _explain(self, error: Exception, url: str) -> str:
        host = urlsplit(url).netloc.rpartition("@")[2]
        if isinstance(error, socket.gaierror):
            return f"the name {host} cannot be resolved: is there a network?"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"certificate of {host} is not trusted: {error.verify_message}"
        tries = len(self.patience.waits_s) + 1
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"no answer from {host} in {tries} tries: {said}"

    def _follow(
        self, url: str, headers: Mapping[str, str], private: Mapping[str, str], where: object
    ) -> Response:
        origin = _origin(urlsplit(url))
        hops: dict[str, str] = {}
        for _ in range(_MAX_REDIRECTS + 1):
            split = urlsplit(url)
            at_home = _origin(split) == origin
            response = self._send(split, {**headers, **(private if at_home else {})}, hops)
            hops.update(
                {name: response.headers[name] for name in _HOP_HEADERS if name in response.headers}
            )
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response
            with response:
                for _chunk in response.chunks(_DRAINED_NBYTES):
                    pass
            url = _next_url(url, location, where)
        raise RemoteError(f"over {_MAX_REDIRECTS} redirects", path=where)

    def _send(
        self, split: SplitResult, headers: Mapping[str, str], hops: Mapping[str, str]
    ) -> Response:
        key = _origin(split)
        with self._lock:
            kept = self._idle.get(key)
            connection = kept.pop() if kept else None
            self.requests += 1
        if connection is not None:
            try:
                return self._exchange(connection, split, headers, hops)
            except _BROKEN:
                pass  # the server had closed the idle connection: a new one decides
        return self._exchange(self._connect(split), split, headers, hops)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        split: SplitResult,
        headers: Mapping[str, str],
        hops: Mapping[str, str],
    ) -> Response:
        target = f"{split.path or '/'}{'?' + split.query if split.query else ''}"
        target = quote(target, safe=_URL_CHARACTERS)
        sent = {**_HEADERS, **headers}
        if split.scheme == "http" and (proxy := _proxy(split)):
            target = f"{split.scheme}://{split.netloc}{target}"
            sent |= _proxy_headers(proxy)
        try:
            connection.request("GET", target, headers=sent)
            raw = connection.getresponse()
        except BaseException:
            connection.close()
            raise

        def finish() -> None:
            if raw.length == 0:
                raw.read()  # nothing is left: tells http.client that the connection is free
            with self._lock:
                self.nbytes += response.nbytes_read
                if raw.isclosed() and connection.sock is not None:
                    self._idle.setdefault(_origin(split), []).append(connection)
                    return
            raw.close()
            connection.close()

        response = Response(raw, split.geturl(), hops=hops, patience=self.patience, finish=finish)
        return response

    def _connect(self, split: SplitResult) -> http.client.HTTPConnection:
        proxy = _proxy(split)
        host, port = proxy.hostname if proxy else split.hostname, (proxy or split).port
        connection: http.client.HTTPConnection
        if split.scheme == "https":
            if self._context is None:
                self._context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                host or "", port, timeout=self.patience.connect_s, context=self._context
            )
            if proxy:
                connection.set_tunnel(
                    split.hostname or "", split.port or 443, headers=_proxy_headers(proxy)
                )
        else:
            connection = http.client.HTTPConnection(
                host or "", port, timeout=self.patience.connect_s
            )
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(self.patience.silence_s)
        return connection


def _origin(split: SplitResult) -> tuple[str, str]:
    port = split.port or (443 if split.scheme == "https" else 80)
    return split.scheme, f"{(split.hostname or '').lower()}:{port}"


def _next_url(url: str, location: str, where: object) -> str:
    try:
        target = urljoin(url, location)
        split = urlsplit(target)
        _origin(split)
    except ValueError:
        raise RemoteError("redirects to what is no URL", path=where) from None
    if split.scheme not in ("http", "https") or not split.hostname:
        raise RemoteError(f"redirects to {shown(target)}, which is no web address", path=where)
    if url.startswith("https:") and split.scheme == "http":
        raise RemoteError(f"redirects from https to {shown(target)}: refused", path=where)
    return target


def _retry_after(text: str, wait_s: float) -> float:
    """Seconds to wait: what the server asks for where that is a sane number."""
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else wait_s


def _proxy(split: SplitResult) -> SplitResult | None:
    host = split.hostname or ""
    named = getproxies().get(split.scheme)
    if not named or host in _LOOPBACK or proxy_bypass(host):
        return None
    return urlsplit(named if "//" in named else f"http://{named}")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
