"""A hub on 127.0.0.1, with a CDN beside it and every fault a network knows.

Routes are those of the Hugging Face Hub that are used: the listing of a repository and the files
themselves; large files redirect to the CDN, a second server on a port of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from diffquant.io import transport

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LFS_NBYTES = 1000  # files from here on are LFS objects, and redirect
SILENCE_S = 20.0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path matches."""

    kind: str
    where: str = ""
    times: int = 10**9
    value: object = None


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    server: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Hub:
    """The state of both servers; tests change it while they run."""

    url: str = ""
    cdn_url: str = ""
    repos: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    token: str = ""
    redirects: bool = True
    ranges: bool = True
    page: int = 1000
    etag_suffix: str = ""
    message: str = ""
    ignore_if_range: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, files: Mapping[str, bytes | Path]) -> None:
        self.repos.setdefault(repo, {}).update(files)

    def fail(self, kind: str, where: str = "", times: int = 10**9, value: object = None) -> None:
        self.faults.append(Fault(kind, where, times, value))

    def requests(self, where: str = "") -> list[Asked]:
        return [one for one in self.asked if re.search(where, f"{one.server}{one.path}")]


def size_of(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def slice_of(content: bytes | Path, begin: int, end: int) -> bytes:
    if not isinstance(content, Path):
        return content[begin:end]
    with content.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def sha256_of(content: bytes | Path) -> str:
    if isinstance(content, Path) and content.stat().st_size > 1 << 30:
        return hashlib.sha256(str(content).encode()).hexdigest()  # a sparse giant: any oid will do
    return hashlib.sha256(slice_of(content, 0, size_of(content))).hexdigest()


def blob_sha1_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    name: str

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        self.hub.asked.append(Asked(self.name, self.path, dict(self.headers)))
        fault = self._fault(path)
        if fault is not None and fault.kind == "status":
            headers = {"Retry-After": "0"} if fault.value == 429 else {}
            if self.hub.message:
                headers["X-Error-Message"] = self.hub.message
            self.answer(int(fault.value), b"", headers)
        elif fault is not None and fault.kind == "silence":
            self.hub.stopping.wait(SILENCE_S)
            self.close_connection = True
        elif fault is not None and fault.kind == "redirect":
            self.answer(302, b"", {"Location": str(fault.value)})
        elif self.name == "cdn":
            _, _, repo, rest = path.split("/", 3)
            repo, path = f"{repo}/{rest.split('/', 1)[0]}", rest.split("/", 1)[1]
            self.serve(self.hub.repos[repo][path], fault)
        elif path.startswith("/api/models/"):
            self.list_files(path, parse_qs(split.query))
        else:
            self.resolve(path, fault)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.where, f"{self.name}{path}"):
                fault.times -= 1
                return fault
        return None

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def allowed(self, repo: str) -> bool:
        authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repos:
            self.answer(404 if authorized else 401, b"", {"X-Error-Code": "RepoNotFound"})
            return False
        if repo in self.hub.gated and not authorized:
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
            return False
        return True

    def list_files(self, path: str, query: Mapping[str, list[str]]) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path)
        assert found
        repo, revision = found.groups()
        if not self.allowed(repo):
            return
        if revision not in ("main", COMMIT, OLD_COMMIT, "refs/pr/3"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        rows: list[object] = [{"type": "directory", "path": "unet", "oid": "0" * 40, "size": 0}]
        for name, content in self.hub.repos[repo].items():
            size = size_of(content)
            row = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
            if size >= LFS_NBYTES:
                row["lfs"] = {"oid": sha256_of(content), "size": size, "pointerSize": 130}
            else:
                row["oid"] = blob_sha1_of(slice_of(content, 0, size))
            rows.append(row)
        begin = int(query.get("cursor", ["0"])[0])
        end = begin + self.hub.page
        headers = {"Content-Type": "application/json"}
        if end < len(rows):
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={end}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer(200, json.dumps(rows[begin:end]).encode(), headers)

    def resolve(self, path: str, fault: Fault | None) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(main|refs/pr/3|[^/]+)/(.+)", path)
        if found is None:
            self.answer(404, b"")
            return
        repo, revision, name = found.groups()
        if not self.allowed(repo):
            return
        if revision not in ("main", COMMIT, OLD_COMMIT, "refs/pr/3"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content = self.hub.repos[repo].get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"X-Repo-Commit": COMMIT}
        if self.hub.redirects and size_of(content) >= LFS_NBYTES:
            headers["Location"] = f"{self.hub.cdn_url}/files/{repo}/{name}?signature=secret"
            headers["X-Linked-Etag"] = f'"{sha256_of(content)}"'
            self.answer(302, b"moved", headers)
            return
        self.serve(content, fault, headers)

    def serve(
        self, content: bytes | Path, fault: Fault | None, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = fault.kind if fault else ""
        size = size_of(content)
        etag = f'"{size:x}{self.hub.etag_suffix}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range", etag)
        sent = {**(headers or {}), "ETag": etag}
        if (
            asked is None
            or not self.hub.ranges
            or (condition != etag and not self.hub.ignore_if_range)
        ):
            status, begin, end = 200, 0, size
        else:
            begin = int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else size, size)
            if begin >= size:
                self.answer(416, b"", {**sent, "Content-Range": f"bytes */{size}"})
                return
            status = 206
            sent["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if kind == "range":
            sent["Content-Range"] = str(fault.value)
        if kind == "encoding":
            sent["Content-Encoding"] = "gzip"
        length = int(fault.value) if kind == "length" else end - begin
        stop = end
        if kind == "cut":
            stop = begin + (int(fault.value) if fault.value is not None else (end - begin) // 2)
        self.send_response(status)
        for key, value in {**sent, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            if kind == "drip":  # a few bytes, one by one; then all of it
                for _ in range(int(fault.value)):
                    self.wfile.write(slice_of(content, begin, begin + 1))
                    begin += 1
                    self.hub.stopping.wait(0.05)
            for at in range(begin, stop, 1 << 20):
                self.wfile.write(slice_of(content, at, min(at + (1 << 20), stop)))
        except OSError:  # the client has had enough
            self.close_connection = True
        if kind in ("cut", "length"):
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub and its CDN until the context ends."""
    hub = Hub()
    servers = []
    for name in ("hub", "cdn"):
        handler = type(f"_{name}", (_Handler,), {"hub": hub, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.block_on_close = False
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.stopping.set()
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT names, an empty cache, no token, and little patience."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".hf-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / ".hf-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    patience = transport.Patience(connect_s=5, silence_s=0.5, waits_s=(0.01, 0.01, 0.01))
    monkeypatch.setattr(transport, "PATIENCE", patience)
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served
