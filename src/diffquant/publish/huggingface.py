"""The Hugging Face Hub, or a server that speaks as it does (HF_ENDPOINT), by huggingface_hub.

`upload_folder` is the client's resumable uploader: called again after a cut, it asks the server
what has come already. Source: huggingface_hub 2.4.0 hf_api.py (upload_folder, auth_check).
"""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffquant.core.errors import UsageError
from diffquant.io.remote_name import endpoint
from diffquant.publish.hubs import (
    Commit,
    RemoteFile,
    RepoState,
    Target,
    check_online,
    refusal,
    small_text,
)
from diffquant.publish.licences import front_matter
from diffquant.publish.tokens import Redactor, token_from

__all__ = ["HuggingFace"]

_MAIN = "main"


class HuggingFace:
    """See HubClient."""

    def __init__(self, token_file: Path | None = None, *, bars: bool = False) -> None:
        """Find the token.

        Args:
            token_file: holds it; else HF_TOKEN, else what `hf auth login` stored.
            bars: draw the client's progress bars.

        Raises:
            UsageError: there is none.
            RemoteError: HF_HUB_OFFLINE is set.
        """
        check_online()
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils.tqdm import disable_progress_bars

        token = token_from(token_file) if token_file is not None else get_token()
        if not token:
            raise UsageError(
                "no access token: run `hf auth login`, set HF_TOKEN, or give --token-file FILE"
            )
        if not bars:
            disable_progress_bars()
        self.redactor = Redactor(token)
        self._api = HfApi(endpoint=endpoint(), token=token)

    def check(self, repo: str) -> None:
        """Ask who the token belongs to."""
        with self._errors("check the token", repo):
            self._api.whoami()

    def state(self, target: Target, *, write: bool) -> RepoState | None:
        """Look at the repository."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._errors("look at the repository", target.repo):
            try:
                info = self._api.model_info(target.repo)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise
            if write:
                self._api.auth_check(target.repo, write=True)
            refs = self._api.list_repo_refs(target.repo)
            branch = target.revision or _MAIN
            if not branch.startswith("refs/") and branch not in {b.name for b in refs.branches}:
                branch = _MAIN  # upload makes it from there
            if branch != _MAIN:
                info = self._api.model_info(target.repo, revision=branch)
            return RepoState(
                private=info.private,
                files=self._files(target.repo, branch),
                commit=info.sha or "",
                tags=frozenset(one.name for one in refs.tags),
            )

    def _files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        found = {}
        for one in self._api.list_repo_tree(repo, recursive=True, revision=revision):
            size = getattr(one, "size", None)
            if size is None:  # a folder
                continue
            lfs = getattr(one, "lfs", None)
            found[one.path] = RemoteFile(
                nbytes=size,
                sha256=lfs.sha256 if lfs is not None else "",
                blob_sha1="" if lfs is not None else str(getattr(one, "blob_id", "")),
            )
        return found

    def create(self, repo: str, *, private: bool) -> None:
        """Make the repository."""
        with self._errors("make the repository", repo):
            self._api.create_repo(repo, private=private, exist_ok=False)

    def read_text(self, target: Target, path: str) -> str:
        """Download a small file, past every cache."""
        with tempfile.TemporaryDirectory() as folder, self._errors(f"read {path}", target.repo):
            found = self._api.hf_hub_download(
                target.repo, path, revision=target.revision or _MAIN, local_dir=folder
            )
            return small_text(Path(found))

    def card_of(self, repo: str) -> Mapping[str, Any]:
        """Front matter of a model's card, {} where it has none that can be read."""
        with tempfile.TemporaryDirectory() as folder, self._errors("read the card", repo):
            from huggingface_hub.errors import EntryNotFoundError

            try:
                found = self._api.hf_hub_download(repo, "README.md", local_dir=folder)
            except EntryNotFoundError:
                return {}
            return front_matter(Path(found))

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
        """Upload what changed."""
        with self._errors("upload", target.repo):
            if target.revision not in ("", _MAIN) and not target.revision.startswith("refs/"):
                self._api.create_branch(target.repo, branch=target.revision, exist_ok=True)
            done = self._api.upload_folder(
                repo_id=target.repo,
                folder_path=folder,
                commit_message=message,
                revision=target.revision or None,
                parent_commit=parent if parent and not create_pr else None,
                create_pr=create_pr,
                ignore_patterns=[glob.escape(path) for path in unchanged],
            )
            return Commit(done.oid, done.commit_url, done.pr_url or "")

    def tag(self, target: Target, tag: str, commit: str) -> None:
        """Tag a commit."""
        with self._errors(f"tag {tag}", target.repo):
            self._api.create_tag(target.repo, tag=tag, revision=commit or target.revision or _MAIN)

    def url(self, repo: str) -> str:
        """Where people look at it."""
        return f"{endpoint()}/{repo}"

    @contextlib.contextmanager
    def _errors(self, doing: str, repo: str) -> Iterator[None]:
        """Turn what the client raises into one line."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        # Of whichever httpx this client is built on.
        network: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            yield
        except HFValidationError as error:
            raise UsageError(f"{repo}: {self.redactor.clean(str(error))[:200]}") from None
        except (HfHubHTTPError, network, RuntimeError, OSError) as error:
            inner = _first(error, (HfHubHTTPError, network)) or error
            response = getattr(inner, "response", None)
            status = response.status_code if response is not None else None
            told = refusal(
                inner,
                doing=doing,
                target=repo,
                status=status,
                redactor=self.redactor,
                cut=isinstance(inner, (network, ConnectionError, TimeoutError)),
            )
            raise told from told.__cause__


def _first(
    error: BaseException | None, kinds: tuple[type[BaseException], ...]
) -> BaseException | None:
    """The first error of some kind among an error and its causes."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
