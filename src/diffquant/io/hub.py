"""A model repository on the Hugging Face Hub, or a server that speaks as it does (HF_ENDPOINT).

::

    GET /api/models/{repo}/tree/{rev}?recursive=true    [{"type", "path", "size", "oid",
                                                          "lfs": {"oid", "size"}}, ...]
                                                        Link: <...>; rel="next"
    GET /{repo}/resolve/{rev}/{path}                    the file, or a redirect to a CDN
        X-Repo-Commit     the commit that `rev` stands for: later requests ask for that one
        X-Error-Code      RepoNotFound RevisionNotFound EntryNotFound GatedRepo

A file in the cache of huggingface_hub is read there, with no request. HF_TOKEN (or what `hf auth
login` stored) is sent to the hub alone. The listing is ours and not HfApi's: the same limits,
retries and messages hold for every request, and one place counts them.

Source: huggingface/huggingface_hub@ee0a4510f src/huggingface_hub/hf_api.py (list_repo_tree),
utils/_http.py (hf_raise_for_status), file_download.py (try_to_load_from_cache).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

from diffquant.core.errors import CheckpointError, MalformedFile, RemoteError, closest, shorten
from diffquant.io.ranges import RangeReader, Resource
from diffquant.io.remote_name import HubName, endpoint
from diffquant.io.remote_path import RemoteEntry, RemoteTree
from diffquant.io.sharded import plain_name
from diffquant.io.transport import Response, Transport

__all__ = ["HubTree"]

_LOG = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')
_MAX_PAGE_NBYTES = 32 << 20
_MAX_PAGES = 100
_MAX_ENTRIES = 100_000
_SHOWN = 200  # characters of the server's own words


class HubTree(RemoteTree):
    """One revision of a repository; the commit is fixed by the first answer."""

    def __init__(self, name: HubName, transport: Transport | None = None) -> None:
        super().__init__(transport or Transport())
        self.repo = name.repo
        self.revision = name.revision
        self.commit = name.revision if _COMMIT.fullmatch(name.revision) else ""
        self.endpoint = endpoint()
        self._private: dict[str, str] | None = None

    def label(self, relative: str) -> str:
        """`hf://owner/repo/path@rev`."""
        return str(HubName(self.repo, relative, self.revision))

    def url(self, relative: str) -> str:
        """Where a file is asked for."""
        revision = quote(self.commit or self.revision, safe="")
        return f"{self.endpoint}/{self.repo}/resolve/{revision}/{quote(relative)}"

    def resource(self, relative: str) -> Resource:
        """How to ask for a file."""
        return Resource(
            self.url(relative),
            self.label(relative),
            private=self.credentials(),
            explain=lambda response: self.explain(response, relative),
        )

    def credentials(self) -> Mapping[str, str]:
        """The Authorization header, where the user has a token."""
        if self._private is None:
            from huggingface_hub import get_token

            token = get_token()
            self._private = {"Authorization": f"Bearer {token}"} if token else {}
        return self._private

    def local(self, relative: str) -> Path | None:
        """The file in the cache of huggingface_hub, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        if not all(plain_name(part) for part in relative.split("/")):
            return None  # a name from a listing must not lead out of the cache
        revision = self.commit or self.revision
        found = try_to_load_from_cache(self.repo, relative, revision=revision)
        if not isinstance(found, str) or not Path(found).is_file():
            return None
        _LOG.info("%s: read from the cache of huggingface_hub", self.label(relative))
        return Path(found)

    def make_reader(self, relative: str) -> RangeReader:
        """Begin to read a file.

        Raises:
            RemoteError, CheckpointError: see `explain`.
        """
        reader = super().make_reader(relative)
        self._fix_commit(reader.hops)
        reader.move(self.resource(relative))
        return reader

    def listing(self) -> Mapping[str, RemoteEntry]:
        """Path -> entry of every file.

        Raises:
            RemoteError: no such repository or revision, no access, or an answer that is no listing.
        """
        if not self.listed:
            revision = quote(self.commit or self.revision, safe="")
            url = f"{self.endpoint}/api/models/{self.repo}/tree/{revision}?recursive=true"
            found: dict[str, RemoteEntry] = {}
            for _ in range(_MAX_PAGES):
                rows, next_url = self._page(url)
                found |= {entry.path: entry for row in rows if (entry := _entry(row)) is not None}
                if not next_url:
                    break
                if urlsplit(next_url)[:2] != urlsplit(self.endpoint)[:2]:
                    raise RemoteError("its listing goes on elsewhere", path=self.label(""))
                url = next_url
            if len(found) > _MAX_ENTRIES:
                raise RemoteError(f"over {_MAX_ENTRIES} files", path=self.label(""))
            self.listed = found
        return self.listed

    def _page(self, url: str) -> tuple[list[object], str]:
        where = self.label("")
        response, raw = self.transport.whole(
            url, limit=_MAX_PAGE_NBYTES, private=self.credentials(), where=where
        )
        if response.status != 200:
            raise self.explain(response, "")
        self._fix_commit(response.hops)
        following = _NEXT.search(response.headers.get("Link", ""))
        try:
            rows = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise MalformedFile(f"its listing is not JSON: {error}", path=where) from None
        if not isinstance(rows, list):
            raise MalformedFile("its listing is no JSON list", path=where)
        return rows, following[1] if following else ""

    def _fix_commit(self, hops: Mapping[str, str]) -> None:
        commit = hops.get("X-Repo-Commit", "")
        if not self.commit and _COMMIT.fullmatch(commit):
            self.commit = commit

    def explain(self, response: Response, relative: str) -> CheckpointError:
        """Turn a refusal into an error that says what to do."""
        code = response.headers.get("X-Error-Code") or response.hops.get("X-Error-Code", "")
        status = response.status
        where = self.label(relative)
        page = f"{self.endpoint}/{self.repo}"
        token = "HF_TOKEN" if not self.credentials() else "a token that may read it"
        said = response.headers.get("X-Error-Message", "")[:_SHOWN]
        if code == "GatedRepo":
            text = f"gated: accept its licence at {page}, then set {token} (or run `hf auth login`)"
        elif code == "RepoNotFound" or status == 401:
            text = (
                f"no repository {self.repo} at {self.endpoint}, or a private one: check the name, "
                f"or set {token} (or run `hf auth login`)"
            )
        elif code == "RevisionNotFound":
            text = f"{self.repo} has no branch, tag or commit {self.revision!r}"
        elif code == "EntryNotFound" or (status == 404 and relative):
            text = self.missing(relative)
        elif status == 403:
            text = f"{self.endpoint} refuses: {said or 'forbidden'}; set {token}"
        elif status == 429:
            text = f"{self.endpoint} has had too many requests: wait a while, or set {token}"
        else:
            text = f"{self.endpoint} answers {status}" + (f": {said}" if said else "")
        return RemoteError(text, path=where, status=status)

    def missing(self, relative: str) -> str:
        """Say that a file is not there, and which are most like it."""
        names = {path.rpartition("/")[2]: path for path in self.listing()}
        near = closest(relative, self.listing())
        near = near or names.get(closest(relative.rpartition("/")[2], names) or "")
        if near:
            return f"{self.repo} has no file {relative!r}, did you mean {near!r}?"
        return f"{self.repo} has no file {relative!r} (it has {shorten(self.listing())})"


def _entry(row: object) -> RemoteEntry | None:
    """A row of a listing; what is no file, or no row at all, is left out."""
    if not isinstance(row, dict) or row.get("type") != "file":
        return None
    path, size, lfs, oid = row.get("path"), row.get("size"), row.get("lfs"), row.get("oid")
    if not isinstance(path, str) or not path or type(size) is not int or size < 0:
        return None
    sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
    return RemoteEntry(
        path,
        size,
        sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else "",
        oid if lfs is None and isinstance(oid, str) and _COMMIT.fullmatch(oid) else "",
    )
