"""ModelScope, by its own client (`pip install diffquant[modelscope]`).

The client keeps what it has uploaded in a tracker file, which makes a second call go on; it lies in
our cache, since the staging folder does not outlive a run. There are no pull requests here.
Source: modelscope-hub 0.5.1 api.py (HubApi), types.py (FileInfo, RepoInfo), errors.py (HubError).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from diffquant.convert.remember import cache_folder
from diffquant.core.errors import UsageError
from diffquant.publish.hubs import (
    Commit,
    RemoteFile,
    RepoState,
    Target,
    check_online,
    refusal,
    small_text,
)
from diffquant.publish.tokens import Redactor, token_from

__all__ = ["ModelScope"]

_MODEL, _MASTER = "model", "master"
_PUBLIC = 5


class ModelScope:
    """See HubClient."""

    def __init__(self, token_file: Path | None = None, *, bars: bool = False) -> None:
        """Find the client and the token.

        Args:
            token_file: holds it; else MODELSCOPE_API_TOKEN, else what `ms-hub login` stored.
            bars: draw the client's progress bars.

        Raises:
            UsageError: the client is not installed, or there is no token.
            RemoteError: HF_HUB_OFFLINE is set; it stands for every hub here.
        """
        check_online()
        try:
            from modelscope_hub import HubApi
            from modelscope_hub.config import get_default_config
        except ImportError:
            raise UsageError(
                "publishing to ModelScope needs its client: pip install diffquant[modelscope]"
            ) from None
        config = get_default_config()
        token = token_from(token_file) if token_file is not None else config.token
        if not token:
            raise UsageError(
                "no access token of ModelScope: run `ms-hub login`, set MODELSCOPE_API_TOKEN, or "
                "give --token-file FILE"
            )
        self.redactor = Redactor(token)
        self._bars = bars
        self._site = str(config.endpoint or "https://modelscope.cn").rstrip("/")
        self._api: Any = HubApi(token=token, endpoint=self._site)

    def check(self, repo: str) -> None:
        """Ask who the token belongs to."""
        with self._errors("check the token", repo):
            self._api.whoami()

    def state(self, target: Target, *, write: bool) -> RepoState | None:
        """Look at the repository; whether it may be written to shows when it is."""
        with self._errors("look at the repository", target.repo):
            if not self._api.repo_exists(target.repo, _MODEL):
                return None
            info = self._api.get_repo(target.repo, _MODEL)
            found = {
                one.path: RemoteFile(one.size, one.sha256 or "", "")
                for one in self._api.list_repo_files(
                    target.repo, _MODEL, revision=target.revision or _MASTER
                )
                if not one.is_dir
            }
            return RepoState(private=_is_private(info), files=found)

    def create(self, repo: str, *, private: bool) -> None:
        """Make the repository."""
        with self._errors("make the repository", repo):
            visibility = "private" if private else "public"
            self._api.create_repo(repo, _MODEL, visibility=visibility)

    def read_text(self, target: Target, path: str) -> str:
        """Download a small file."""
        with tempfile.TemporaryDirectory() as folder, self._errors(f"read {path}", target.repo):
            found = self._api.download_file(
                target.repo,
                _MODEL,
                path,
                revision=target.revision or _MASTER,
                local_dir=folder,
                force=True,
            )
            return small_text(Path(found))

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
        """Upload what changed.

        Raises:
            UsageError: a pull request was asked for.
        """
        if create_pr:
            raise UsageError("--create-pr: ModelScope has no pull requests; leave it out")
        name = hashlib.sha256(str(target).encode()).hexdigest()[:16]
        tracker = cache_folder() / "publish" / f"modelscope-{name}"
        tracker.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("upload", target.repo):
            self._api.upload_folder(
                target.repo,
                _MODEL,
                folder,
                commit_message=message,
                revision=target.revision or None,
                ignore_patterns=[glob.escape(path) for path in unchanged] or None,
                disable_tqdm=not self._bars,
                tracker_path=tracker,
            )
        return Commit("", self.url(target.repo))

    def tag(self, target: Target, tag: str, commit: str) -> None:
        """Tag the newest commit."""
        with self._errors(f"tag {tag}", target.repo):
            revision = commit or target.revision or _MASTER
            self._api.create_repo_tag(target.repo, _MODEL, tag, revision=revision)

    def url(self, repo: str) -> str:
        """Where people look at it."""
        return f"{self._site}/models/{repo}"

    @contextlib.contextmanager
    def _errors(self, doing: str, repo: str) -> Iterator[None]:
        """Turn what the client raises into one line; its errors carry `status_code`."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            if not _is_clients(error):
                raise
            status = getattr(error, "status_code", None)
            told = refusal(
                error,
                doing=doing,
                target=repo,
                status=status,
                redactor=self.redactor,
                cut=isinstance(error, ConnectionError | TimeoutError),
            )
            raise told from told.__cause__


def _is_clients(error: Exception) -> bool:
    """Whether an error is the client's own, or one of the network or the disk."""
    return isinstance(error, OSError) or any(
        one.__name__ == "HubError" for one in type(error).__mro__
    )


def _is_private(info: Any) -> bool | None:  # noqa: ANN401 - RepoInfo of an optional library
    if info.private is not None:
        return bool(info.private)
    return None if info.visibility is None else int(info.visibility) != _PUBLIC
