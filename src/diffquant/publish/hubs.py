"""What publishing asks of a hub, and one line for each way in which a hub says no.

Two clients fill it: huggingface.py and modelscope.py. Whatever their libraries raise becomes a
RemoteError here: the status, what it means, what to do, and no token (publish/tokens.py).
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from diffquant.core.errors import RemoteError, ResourceError
from diffquant.io.transport import is_offline
from diffquant.publish.tokens import Redactor

__all__ = [
    "Commit",
    "HubClient",
    "RemoteFile",
    "RepoState",
    "Target",
    "check_online",
    "refusal",
    "small_text",
]


@dataclass(frozen=True, slots=True)
class Target:
    """A repository on a hub.

    Attributes:
        hub: "hf" or "modelscope".
        repo: owner/name.
        revision: branch, "" for the hub's default.
    """

    hub: str
    repo: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.hub}:{self.repo}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; a hash that the hub does not state is ""."""

    nbytes: int
    sha256: str = ""
    blob_sha1: str = ""


@dataclass(frozen=True, slots=True)
class RepoState:
    """A repository as it is: its visibility, its files, its newest commit, its tags."""

    private: bool | None
    files: Mapping[str, RemoteFile]
    commit: str = ""
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Commit:
    """What an upload left; `pull_request` is the URL of one."""

    id: str
    url: str
    pull_request: str = ""


class HubClient(Protocol):
    """A hub's client; every method raises RemoteError with one clear line."""

    redactor: Redactor

    def check(self, repo: str) -> None:
        """Whether the token is accepted at all."""

    def state(self, target: Target, *, write: bool) -> RepoState | None:
        """The repository, None where there is none; `write`: whether it may be written to."""

    def create(self, repo: str, *, private: bool) -> None:
        """Make the repository."""

    def read_text(self, target: Target, path: str) -> str:
        """A small text file of the repository."""

    def upload(
        self,
        target: Target,
        folder: Path,
        *,
        unchanged: Collection[str],
        message: str,
        parent: str,
        create_pr: bool,
    ) -> Commit:
        """Upload a folder, all but the unchanged files; a second call goes on from a cut."""

    def tag(self, target: Target, tag: str, commit: str) -> None:
        """Tag a commit."""

    def url(self, repo: str) -> str:
        """Where people look at it."""


def check_online() -> None:
    """Refuse to go on where the network is forbidden, for every hub by the Hub's own variable.

    Raises:
        RemoteError: HF_HUB_OFFLINE is set.
    """
    if is_offline():
        raise RemoteError(
            "HF_HUB_OFFLINE is set, nothing can be published: unset it, or use --dry-run"
        )


def small_text(path: Path) -> str:
    """A downloaded text, no more than its first MiB."""
    with path.open("rb") as file:
        return file.read(_MAX_TEXT_NBYTES).decode("utf-8", "replace")


_MAX_TEXT_NBYTES = 1 << 20
_AGAIN = "run the same command again, what has come is not sent twice"
_MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        400: "the request is not accepted",
        401: "the token is not accepted: log in again, or give another token",
        403: "the token may not do this: it needs write access to the repository (for another's "
        "repository, --create-pr proposes the files)",
        404: "no such repository or revision, or the token may not see it",
        409: "the repository changed or was made meanwhile: look at it, and run the command again",
        412: "the repository changed meanwhile: look at it, and run the command again",
        413: "a file or the upload as a whole is larger than the server takes: publish fewer or "
        "smaller files",
        429: f"too many requests: wait a few minutes and {_AGAIN}",
        507: "the storage of the account is full: free some, or publish elsewhere",
    }
)


def refusal(
    error: BaseException,
    *,
    doing: str,
    target: object,
    status: int | None,
    redactor: Redactor,
    cut: bool = True,
) -> Exception:
    """The error to raise for what a client's library raised.

    Args:
        error: as it came; its text is cleaned before it is kept as the cause.
        doing: what was tried, such as "upload".
        target: the repository.
        status: of the HTTP answer, None where there was none.
        redactor: takes the token out.
        cut: whether an error without a status is one of the network.
    """
    full = _full_disk(error)
    if full is not None:
        where = full.filename or "the temporary folder"
        return ResourceError(f"{target}: no space left on the disk of {where} while: {doing}")
    said = redactor.clean(str(getattr(error, "server_message", "") or "")).strip()
    said = f" (it says: {' '.join(said.split())[:200]})" if said else ""
    kind = type(error).__name__
    raised: Exception
    if status is None and not cut:
        what = " ".join(redactor.clean(str(error)).split())[:200]
        raised = RemoteError(f"{target}: {doing} failed ({kind}: {what}); -v -v tells more")
    elif status is None:
        raised = RemoteError(
            f"{target}: {doing} was cut off ({kind}); check the network and {_AGAIN}"
        )
    else:
        usual = f"the server fails: wait and {_AGAIN}" if status >= 500 else "the server refuses"
        meaning = _MEANINGS.get(status, usual)
        raised = RemoteError(f"{target}: {doing}: {status}, {meaning}{said}", status=status)
    raised.__cause__ = _SaidError(redactor.clean(" <- ".join(_chain(error))))
    raised.__suppress_context__ = True
    return raised


class _SaidError(Exception):
    """What a library said, cleaned: shown with -v -v."""


def _chain(error: BaseException | None) -> list[str]:
    """An error and what it came from, outermost first."""
    told: list[str] = []
    while error is not None and len(told) < 10:
        told.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return told


def _full_disk(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None
