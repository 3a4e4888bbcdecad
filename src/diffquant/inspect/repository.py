"""list_repository(): the checkpoints of a repository that holds several, from its listing alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffquant.core.errors import UsageError
from diffquant.io.quant_label import quant_label
from diffquant.io.remote_name import HubName, parse_remote

if TYPE_CHECKING:
    from diffquant.io.hub import HubTree
    from diffquant.io.remote_path import RemoteEntry

__all__ = ["RepositoryFile", "RepositoryReport", "list_repository"]

_INDEX = re.compile(r"(.+)(\.safetensors|\.bin)\.index(?:\.[^.]+)?\.json")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A checkpoint in a repository.

    Attributes:
        name: what to give `diffquant inspect`.
        path: inside the repository; of a sharded one, its index.
        nbytes: of all its shards.
        shards: how many files it is in.
        label: what the name says of its numbers, "" for nothing.
    """

    name: str
    path: str
    nbytes: int
    shards: int
    label: str


@dataclass(frozen=True, slots=True)
class RepositoryReport:
    """The checkpoints of a repository; `other_files` and `other_nbytes` are what else it holds."""

    path: str
    files: tuple[RepositoryFile, ...]
    other_files: int
    other_nbytes: int


def list_repository(path: str | Path) -> RepositoryReport:
    """List the checkpoints of a repository, or of a folder in it; one request.

    Raises:
        UsageError: not the name of a repository.
        RemoteError: it cannot be listed.
    """
    # What speaks HTTP is loaded for remote names only.
    from diffquant.io.hub import HubTree
    from diffquant.io.remote_choice import checkpoint_names
    from diffquant.io.remote_path import RemotePath

    name = parse_remote(path)
    if not isinstance(name, HubName):
        raise UsageError(f"{path}: only a repository can be listed, hf://owner/repo")
    tree = HubTree(name)
    with tree.held():
        listing = tree.listing()
        found = tuple(
            _file(one, listing, tree) for one in checkpoint_names(RemotePath(tree, name.path))
        )
    total = sum(entry.nbytes for entry in listing.values())
    return RepositoryReport(
        path=str(name),
        files=found,
        other_files=len(listing) - sum(one.shards for one in found),
        other_nbytes=total - sum(one.nbytes for one in found),
    )


def _file(path: str, listing: Mapping[str, RemoteEntry], tree: HubTree) -> RepositoryFile:
    sizes = [listing[path].nbytes]
    if index := _INDEX.fullmatch(path):
        shard = re.compile(rf"{re.escape(index[1])}-\d{{5}}-of-\d{{5}}{re.escape(index[2])}")
        sizes = [entry.nbytes for other, entry in listing.items() if shard.fullmatch(other)]
    return RepositoryFile(tree.label(path), path, sum(sizes), len(sizes), quant_label(path))
