"""What a remote name stands for: a file, a Diffusers folder, or the one checkpoint there is."""

from __future__ import annotations

import re
from pathlib import Path

from diffquant.core.errors import CheckpointError, RemoteError, SeveralCheckpoints, shorten
from diffquant.io import diffusers_folder
from diffquant.io.hub import HubTree
from diffquant.io.remote_name import HubName, UrlName
from diffquant.io.remote_path import RemotePath, as_path
from diffquant.io.transport import is_offline
from diffquant.io.web import UrlTree

__all__ = ["checkpoint_names", "choose", "is_model_file", "pick"]

_WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
# Files of a training run that have a checkpoint's suffix and are none.
_STATES = re.compile(r"(optimizer|scheduler|training_args|rng_state.*|random_states.*)\.\w+")


def choose(name: HubName | UrlName) -> Path:
    """Find what a name means; no request yet where it names a file.

    Raises:
        RemoteError: offline and not in the cache, or the repository cannot be listed.
        SeveralCheckpoints: a repository of several, and none was named.
        CheckpointError: a repository of none.
    """
    if isinstance(name, UrlName):
        web = UrlTree(name)
        return as_path(RemotePath(web, web.asked))
    if is_offline():
        return _cached(name)
    tree = HubTree(name)
    found = RemotePath(tree, name.path)
    if _names_file(name.path):
        tree.asked = name.path
        return as_path(found)
    try:
        return as_path(pick(found))
    except BaseException:
        tree.transport.close()  # nothing will be opened that closes it
        raise


def pick(folder: RemotePath) -> RemotePath:
    """What of a repository, or a folder in it, is meant where no file was named.

    Raises:
        SeveralCheckpoints: it has several checkpoints and is no Diffusers folder.
        CheckpointError: it has none.
    """
    tree = folder.tree
    if folder.relative in tree.listing():
        tree.asked = folder.relative
        return folder
    if _is_folder(folder):
        return folder
    names = checkpoint_names(folder)
    if not names:
        inside = [one.name for one in folder.iterdir()]
        if not inside:
            raise RemoteError(tree.missing(folder.relative), path=folder)
        raise CheckpointError(f"no checkpoint in it (it has {shorten(inside)})", path=folder)
    if len(names) > 1:
        raise SeveralCheckpoints(
            f"{len(names)} checkpoints, name one of them: {shorten(names, 8)}",
            path=folder,
            names=names,
        )
    tree.asked = names[0]
    return RemotePath(tree, names[0])


def checkpoint_names(folder: RemotePath) -> tuple[str, ...]:
    """The files below a folder that can be opened, sorted; shards are their index."""
    prefix = f"{folder.relative}/" if folder.relative else ""
    return tuple(
        path
        for path in sorted(folder.tree.listing())
        if path.startswith(prefix) and _is_checkpoint(path)
    )


def _names_file(path: str) -> bool:
    return path.lower().endswith((*_WEIGHTS, ".index.json"))


def is_model_file(path: str) -> bool:
    """Tell by its name whether a file is a whole checkpoint: no shard, no index, no state."""
    name = path.rpartition("/")[2]
    whole = not _SHARD.fullmatch(name) and not _STATES.fullmatch(name)
    return whole and name.lower().endswith(_WEIGHTS)


def _is_checkpoint(path: str) -> bool:
    return is_model_file(path) or path.lower().endswith(".index.json")


def _is_folder(folder: RemotePath) -> bool:
    if (folder / diffusers_folder.INDEX_NAME).is_file():
        return True
    try:
        return (folder / "config.json").is_file() and diffusers_folder.sniff(as_path(folder), b"")
    except RemoteError:
        raise
    except CheckpointError:  # several weight files beside one config
        return False


def _cached(name: HubName) -> Path:
    """A repository's file or folder in the cache of huggingface_hub.

    Raises:
        RemoteError: it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if _names_file(name.path):
        found = HubTree(name).local(name.path)
    else:
        try:
            folder = Path(
                snapshot_download(name.repo, revision=name.revision, local_files_only=True)
            )
            found = folder / name.path
        except LocalEntryNotFoundError:
            found = None
    if found is None or not found.exists():
        raise RemoteError(
            "HF_HUB_OFFLINE is set and this is not in the cache of huggingface_hub: unset it, or "
            "download the file where there is a network",
            path=name,
        )
    return found
