"""From what a user typed to something that can be opened: the one place that tells remote names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from diffquant.io.reading import RemotePlace
from diffquant.io.remote_name import parse_remote

__all__ = ["held", "is_remote", "locate"]


def locate(path: str | Path) -> Path:
    """Turn a name into a path: of this machine, of a cache on it, or a remote one.

    The code that speaks HTTP is loaded for remote names only.

    Raises:
        UsageError: a remote name that is none.
        CheckpointError: see remote_choice.choose.
    """
    name = None if is_remote(path) else parse_remote(path)
    if name is None:
        return path if isinstance(path, Path) or not isinstance(path, str) else Path(path)
    from diffquant.io.remote_choice import choose

    return choose(name)


def is_remote(path: object) -> bool:
    """Tell what `locate` found elsewhere from a path of this machine."""
    return isinstance(path, RemotePlace)


def held(path: Path) -> AbstractContextManager[None]:
    """Keep the connections of a remote path while the context lasts; nothing for a local one."""
    return path.held() if isinstance(path, RemotePlace) else nullcontext()
