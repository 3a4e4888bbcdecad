"""A hub on 127.0.0.1 that takes uploads: the routes that huggingface_hub 2.4 asks for, and faults.

Repositories, branches, tags and LFS objects are dictionaries that tests look into. A fault answers
the next requests whose method and path match with a status, or cuts the connection midway.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_verySecretToken0123456789"
SIGNATURE = "X-Signature=signedSecret987"
_LFS = (".gguf", ".safetensors", ".png")


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Fault:
    where: str
    status: int = 0  # 0 cuts the connection
    times: int = 1
    message: str = ""


@dataclass
class UploadHub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    read_only: set[str] = field(default_factory=set)

    def fail(self, where: str, status: int = 0, times: int = 1, message: str = "") -> None:
        self.faults.append(Fault(where, status, times, message))

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]

    def count(self, where: str) -> int:
        return sum(re.search(where, one) is not None for one in self.asked)

    def put(self, repo: str, private: bool, **files: bytes) -> Repo:
        made = self.repos[repo] = Repo(private)
        made.branches["main"].update(files)
        return made


def blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, *args: object) -> None:
        pass

    def _do(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        line = f"{self.command} {path}"
        self.hub.asked.append(line)
        fault = next((f for f in self.hub.faults if f.times and re.search(f.where, line)), None)
        if fault is not None:
            fault.times -= 1
            if not fault.status:  # some bytes are taken, then the line is dead
                self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 64))
                self.close_connection = True
                self.connection.close()
                return
            self._body()
            self._json({"error": fault.message or "no"}, fault.status)
            return
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            self._json(
                {"error": "Invalid credentials"},
                401,
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
            return
        for pattern, method, act in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                act(self, body, query, *found.groups())
                return
        self._json({"error": f"no route {line}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _do

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._raw(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _raw(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return found

    def whoami(self, body: bytes, query: Any) -> None:
        self._json(
            {
                "type": "user",
                "name": "me",
                "auth": {"type": "access_token", "accessToken": {"role": "write"}},
            }
        )

    def create(self, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": name}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[name] = Repo(private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def valid_yaml(self, body: bytes, query: Any) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, body: bytes, query: Any, name: str, revision: str | None = None) -> None:
        if (repo := self._repo(name)) is None:
            return
        branch = revision or "main"
        if branch not in repo.branches:
            self._json({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        self._json(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": repo.heads[branch],
                "private": repo.private,
                "siblings": [{"rfilename": one} for one in repo.branches[branch]],
                "tags": [],
            }
        )

    def may_write(self, body: bytes, query: Any, name: str, write: str | None = None) -> None:
        if self._repo(name) is None:
            return
        if name in self.hub.read_only:
            self._json({"error": "Forbidden"}, 403)
            return
        self._json({})

    def refs(self, body: bytes, query: Any, name: str) -> None:
        if (repo := self._repo(name)) is None:
            return

        def rows(kind: str, heads: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": one, "ref": f"refs/{kind}/{one}", "targetCommit": head}
                for one, head in heads.items()
            ]

        self._json(
            {"branches": rows("heads", repo.heads), "tags": rows("tags", repo.tags), "converts": []}
        )

    def tree(self, body: bytes, query: Any, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        rows = []
        for path, data in repo.branches[revision].items():
            row: dict[str, Any] = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": blob_sha1(data),
            }
            if path.endswith(_LFS):
                sha = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
            rows.append(row)
        self._json(rows)

    def preupload(self, body: bytes, query: Any, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        files = []
        for one in json.loads(body)["files"]:
            there = repo.branches.get(revision, {}).get(one["path"])
            lfs = one["path"].endswith(_LFS)
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if lfs else blob_sha1(there)
            files.append(
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self._json({"files": files, "commitOid": repo.heads.get(revision, "0" * 40)})

    def batch(self, body: bytes, query: Any, name: str) -> None:
        rows = []
        for one in json.loads(body)["objects"]:
            row: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{one['oid']}?{SIGNATURE}"
                row["actions"] = {"upload": {"href": href}}
            rows.append(row)
        self._raw(
            json.dumps({"transfer": "basic", "objects": rows}).encode(),
            200,
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def store(self, body: bytes, query: Any, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "damaged"}, 400)
            return
        self.hub.objects[oid] = body
        self._json({})

    def commit(self, body: bytes, query: Any, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        rows = [json.loads(line) for line in body.splitlines()]
        header = next(row["value"] for row in rows if row["key"] == "header")
        parent = header.get("parentCommit")
        if parent and parent != repo.heads.get(revision):
            self._json({"error": "the branch has moved"}, 412)
            return
        number = len(repo.messages) + 1
        pull = "create_pr" in query and query["create_pr"] == ["1"]
        branch = f"refs/pr/{number}" if pull else revision
        files = repo.branches.setdefault(branch, dict(repo.branches["main"]))
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        head = f"{number:040x}"
        repo.heads[branch] = head
        repo.messages.append(header["summary"])
        answer = {
            "success": True,
            "commitOid": head,
            "commitUrl": f"{self.hub.url}/{name}/commit/{head}",
        }
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self._json(answer)

    def make_tag(self, body: bytes, query: Any, name: str, revision: str) -> None:
        repo, tag = self.hub.repos[name], json.loads(body)["tag"]
        if tag in repo.tags:
            self._json({"error": "Tag reference exists already"}, 409)
            return
        repo.tags[tag] = revision
        self._json({})

    def make_branch(self, body: bytes, query: Any, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        repo.branches[branch] = dict(repo.branches["main"])
        repo.heads[branch] = repo.heads["main"]
        self._json({})

    def resolve(self, body: bytes, query: Any, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        data = repo.branches[revision].get(path)
        if data is None:
            self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
            return
        self._raw(
            data, 200, {"ETag": f'"{blob_sha1(data)}"', "X-Repo-Commit": repo.heads[revision]}
        )


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", "GET", _Handler.whoami),
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/validate-yaml", "POST", _Handler.valid_yaml),
    (rf"/api/models/{_NAME}", "GET", _Handler.info),
    (rf"/api/models/{_NAME}/auth-check(/write)?", "GET", _Handler.may_write),
    (rf"/api/models/{_NAME}/refs", "GET", _Handler.refs),
    (rf"/api/models/{_NAME}/revision/(.+)", "GET", _Handler.info),
    (rf"/api/models/{_NAME}/tree/(.+)", "GET", _Handler.tree),
    (rf"/api/models/{_NAME}/preupload/(.+)", "POST", _Handler.preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/lfs/([0-9a-f]{64})", "PUT", _Handler.store),
    (rf"/api/models/{_NAME}/commit/(.+)", "POST", _Handler.commit),
    (rf"/api/models/{_NAME}/tag/(.+)", "POST", _Handler.make_tag),
    (rf"/api/models/{_NAME}/branch/(.+)", "POST", _Handler.make_branch),
    (rf"/{_NAME}/resolve/(main|refs/pr/\d+|[^/]+)/(.+)", "GET", _Handler.resolve),
    (rf"/{_NAME}/resolve/(main|refs/pr/\d+|[^/]+)/(.+)", "HEAD", _Handler.resolve),
)


@contextmanager
def serving() -> Iterator[UploadHub]:
    """Run the hub until the context ends."""
    hub = UploadHub()
    handler = type("_Bound", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def upload_hub(monkeypatch, tmp_path) -> Iterator[UploadHub]:
    """A hub that HF_ENDPOINT names, with a token, no Xet, and no waiting between tries."""
    import huggingface_hub.constants
    import huggingface_hub.utils._http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".hf-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / ".hf-token"))
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / ".cache"))
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
