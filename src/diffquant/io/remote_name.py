"""Names of files that are not here: `hf://owner/repo/file@rev`, pasted links, plain https.

::

    hf://owner/repo                      a repository: its folder, or its one weight file
    hf://owner/repo/path/file@rev        a file or sub-folder of a branch, tag or commit
    hf://owner/repo@rev/path/file        the same, as huggingface_hub writes it
    https://huggingface.co/owner/repo/blob/rev/path/file     as copied from a browser
    https://example.org/model.gguf       any server that takes range requests

`Path("hf://a/b")` has one slash left, and backslashes on Windows; that is understood too.

Source: huggingface/huggingface_hub@ee0a4510f src/huggingface_hub/utils/_hf_uris.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath
from urllib.parse import unquote, urlsplit

from diffquant.core.errors import UsageError
from diffquant.io.sharded import plain_name

__all__ = ["HubName", "UrlName", "endpoint", "parse_remote"]

_REMOTE = re.compile(r"(hf|https?):/{1,2}(?=[^/])", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w.][\w./+-]{0,200}", re.ASCII)
# The revisions that have slashes.
_REF = re.compile(r"(refs/(?:pr/\d+|convert/[\w.-]+))(?:/|$)")
_OTHER_KINDS = {"datasets", "spaces", "kernels", "buckets"}
_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_ROUTES = {"blob", "resolve", "raw", "tree", "blame"}
_FORM = "expected hf://owner/repo, hf://owner/repo/path/file or hf://owner/repo/path/file@revision"


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class HubName:
    """A model repository, or a file or folder in it."""

    repo: str
    path: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        place = f"{self.repo}/{self.path}" if self.path else self.repo
        return f"hf://{place}" + ("" if self.revision == "main" else f"@{self.revision}")


@dataclass(frozen=True, slots=True)
class UrlName:
    """A file on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url


def parse_remote(text: str | PurePath) -> HubName | UrlName | None:
    """Read a name; None where it names something on this machine.

    Raises:
        UsageError: it starts as a remote name does, and is none.
    """
    text = str(text)
    found = _REMOTE.match(text.replace("\\", "/"))
    if found is None:
        return None
    scheme, rest = found[1].lower(), text.replace("\\", "/")[found.end() :]
    if scheme == "hf":
        return _hub_name(rest, text)
    return _pasted(f"{scheme}://{rest}", text)


def _hub_name(rest: str, text: str) -> HubName:
    parts = rest.strip("/").split("/")
    if parts[0] == "models":
        parts = parts[1:]
    if parts and parts[0] in _OTHER_KINDS:
        raise UsageError(f"{text}: only model repositories are read, not {parts[0]}")
    if len(parts) < 2:
        raise UsageError(f"{text}: {_FORM}")
    owner, repo, path = parts[0], parts[1], "/".join(parts[2:])
    revision = "main"
    if "@" in repo:
        repo, _, revision = repo.partition("@")
        if special := _REF.match(f"{revision}/{path}"):
            revision, path = special[1], f"{revision}/{path}"[special.end() :]
    elif "@" in path:
        path, _, revision = path.rpartition("@")
    return _checked(f"{owner}/{repo}", path, unquote(revision), text)


def _pasted(url: str, text: str) -> HubName | UrlName:
    """A link into the hub's pages becomes a HubName, any other stays what it is."""
    try:
        split = urlsplit(url)
        _ = split.port
    except ValueError as error:
        raise UsageError(f"{text}: no web address: {error}") from None
    if not split.hostname:
        raise UsageError(f"{text}: no web address, it names no host")
    if split.username is not None:
        raise UsageError(
            f"{url.partition('//')[0]}//...: a link with a password in it is not taken"
        )
    base = urlsplit(endpoint())
    ours = split.netloc == base.netloc and split.path.startswith(base.path + "/")
    if split.hostname not in _HUB_HOSTS and not ours:
        return UrlName(url)
    parts = unquote(split.path.removeprefix(base.path if ours else "")).strip("/").split("/")
    if parts[0] in _OTHER_KINDS:
        raise UsageError(f"{text}: only model repositories are read, not {parts[0]}")
    if len(parts) == 2:
        return _checked("/".join(parts), "", "main", text)
    if len(parts) < 4 or parts[2] not in _ROUTES:
        raise UsageError(f"{text}: no link to a repository or a file in one; {_FORM}")
    rest = "/".join(parts[3:])
    special = _REF.match(rest)
    revision = special[1] if special else parts[3]
    return _checked("/".join(parts[:2]), rest[len(revision) :].strip("/"), revision, text)


def _checked(repo: str, path: str, revision: str, text: str) -> HubName:
    path = path.strip("/")
    if not all(_REPO.fullmatch(part) for part in repo.split("/")):
        raise UsageError(f"{text}: {repo!r} is no name of a repository; {_FORM}")
    if path and not all(plain_name(part) for part in path.split("/")):
        raise UsageError(f"{text}: {path!r} is no path inside a repository; {_FORM}")
    if not _REVISION.fullmatch(revision):
        raise UsageError(f"{text}: {revision!r} is no branch, tag or commit; {_FORM}")
    return HubName(repo, path, revision)
