"""A checkpoint in several files: `<name>.safetensors.index.json` and the shards it names.

The index is one JSON object, {"metadata": {...}, "weight_map": {"key": "shard file name", ...}}.
Shards are plain names inside the index's own folder. Tensors of a shard that the index does not
list are left out, named in `unlisted`, and logged.

Source: huggingface/huggingface_hub src/huggingface_hub/serialization/_base.py (StateDictSplit).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffquant.core.errors import CheckpointError, MalformedFile, MissingKeys, shorten
from diffquant.core.tensors import ByteArray, Closing, TensorSource, TensorSpec
from diffquant.io import safetensors, torch_pickle
from diffquant.io.reading import expect_files, find_spec, open_random

__all__ = ["ShardedSource", "open_index", "plain_name", "read_index", "sniff"]

_LOG = logging.getLogger(__name__)
_MAX_INDEX_NBYTES = 64 << 20
_MAX_SHARDS = 10_000


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a file is a shard index: by its name, since it is plain JSON."""
    return head[:1] == b"{" and ".index." in path.name and path.suffix == ".json"


class ShardedSource(Closing):
    """Several sources as one; `unlisted` are (shard, key) that the index does not name."""

    def __init__(
        self,
        path: Path,
        *,
        sources: Mapping[str, TensorSource],
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, Any],
        unlisted: tuple[tuple[str, str], ...],
    ) -> None:
        self.path = path
        self.container = "sharded"
        self.specs: Mapping[str, TensorSpec] = specs
        self.metadata: Mapping[str, Any] = metadata
        self.configs: Mapping[str, Any] = {}
        self.unlisted = unlisted
        self.files = tuple(dict.fromkeys(source.path for source in sources.values()))
        self.nbytes = sum(file.stat().st_size for file in self.files)
        self._sources = sources

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return self.files

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        find_spec(self.specs, key, self.path)
        return self._sources[key].read(key, rows)

    def close(self) -> None:
        """Close every shard."""
        for source in self._sources.values():
            source.close()


def open_index(path: Path) -> ShardedSource:
    """Open the shards that an index names.

    Raises:
        MalformedFile: no JSON index, or a shard name that is not a plain file name.
        MissingKeys: the index places a tensor in a shard that lacks it.
        CheckpointError: a shard is missing or cannot be opened.
    """
    weight_map, notes = read_index(path)
    shards = tuple(dict.fromkeys(weight_map.values()))
    _check_shards(path, weight_map, shards)
    with contextlib.ExitStack() as stack:
        expect_files(path.parent, shards)
        opened: dict[str, TensorSource] = {}
        for shard in shards:
            opened[shard] = stack.enter_context(_open_shard(path, shard))
        lost = [key for key, shard in weight_map.items() if key not in opened[shard].specs]
        if lost:
            raise MissingKeys(
                f"{path}: shards lack tensors the index lists: {shorten(lost)}", keys=tuple(lost)
            )
        specs: dict[str, TensorSpec] = {}
        unlisted: list[tuple[str, str]] = []
        for shard, source in opened.items():
            for key, spec in source.specs.items():
                if weight_map.get(key) == shard:
                    specs[key] = spec
                else:
                    unlisted.append((shard, key))
        stack.pop_all()
    if unlisted:
        names = shorten(f"{key} in {shard}" for shard, key in unlisted)
        _LOG.warning("%s: tensors that the index does not list are left out: %s", path, names)
    first = opened[shards[0]].metadata if shards else {}
    return ShardedSource(
        path,
        sources={key: opened[weight_map[key]] for key in specs},
        specs=specs,
        metadata={**notes, **first},
        unlisted=tuple(unlisted),
    )


def _check_shards(index: Path, weight_map: Mapping[str, str], shards: tuple[str, ...]) -> None:
    """Refuse an index some of whose files are not there, and say all of them."""
    lost = [shard for shard in shards if not (index.parent / shard).is_file()]
    if lost:
        absent = frozenset(lost)
        count = sum(shard in absent for shard in weight_map.values())
        raise CheckpointError(
            f"{len(lost)} of {len(shards)} shards are missing, with {count} of {len(weight_map)} "
            f"tensors: {shorten(lost)}; download them too",
            path=index,
        )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read an index: (key -> shard, its metadata); no shard is looked for.

    Raises:
        MalformedFile: no JSON index, or a shard name that is not a plain file name.
    """
    file = open_random(path)
    try:
        if file.size > _MAX_INDEX_NBYTES:
            raise MalformedFile(
                f"index of {file.size} bytes, at most {_MAX_INDEX_NBYTES} expected", path=path
            )
        index = safetensors.parse_json(file.read(0, file.size).tobytes(), path, "index")
    finally:
        file.close()
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise MalformedFile("index has no object 'weight_map'", path=path)
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not plain_name(shard):
            raise MalformedFile(
                f"{key!r} lies in {shard!r:.80}, which is no plain file name", path=path
            )
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise MalformedFile(f"more than {_MAX_SHARDS} shards", path=path)
    notes = index.get("metadata")
    return weight_map, (
        {key: str(value) for key, value in notes.items()} if isinstance(notes, dict) else {}
    )


def plain_name(name: str) -> bool:
    """Tell whether `name` is a file name that stays in its folder, on every system."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\:\0")


def _open_shard(index: Path, shard: str) -> TensorSource:
    path = index.parent / shard
    if path.suffix in (".bin", ".pt", ".pth"):
        return torch_pickle.open_file(path)
    return safetensors.open_file(path)
