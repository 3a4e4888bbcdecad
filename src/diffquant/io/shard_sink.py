"""Writing a checkpoint in several files: shards of a bounded size and the index that names them.

::

    model-00001-of-00003.safetensors ...    tensors in order, each shard filled up to the limit
    model.safetensors.index.json            {"metadata": {"total_size": N}, "weight_map": {...}}

Shards take their names one after the other, the index last: a run that is killed between leaves
shards without an index, which nothing reads, and the next run with --force replaces them. Names and
fields are those of huggingface_hub 1.x serialization/_base.py (split_state_dict_into_shards).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffquant.core.errors import PlanMismatch, UsageError
from diffquant.core.tensors import Aborting, ByteArray, TensorSpec
from diffquant.io import safetensors
from diffquant.io.atomic import FlatSink, PartialFile, check_disk, check_parent, unique_specs

__all__ = ["INDEX_ENDING", "ShardSink", "create", "split"]

INDEX_ENDING = ".index.json"


def split(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Cut a list of tensors into shards of at most `limit` bytes; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    room = limit
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def create(
    path: Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, Any],
    *,
    limit: int,
    force: bool = False,
) -> ShardSink:
    """Open an output in shards.

    Args:
        path: the safetensors file it would be in one piece; shards and index stand beside it.
        specs: tensors in order.
        metadata: text to text, in every shard.
        limit: bytes of tensors per shard.
        force: whether existing files may be replaced.

    Raises:
        UsageError: a target exists.
        ResourceError: the disk is too small.
    """
    planned = unique_specs(specs)
    shards = split(planned, limit)
    stem, ending = path.stem, path.suffix
    names = [
        f"{stem}-{index:05d}-of-{len(shards):05d}{ending}" for index in range(1, len(shards) + 1)
    ]
    index = path.with_name(path.name + INDEX_ENDING)
    taken = [one for one in (index, *map(path.with_name, names)) if one.exists()]
    if taken and not force:
        raise UsageError(f"{taken[0]} exists; use --force to replace it")
    check_parent(path)
    check_disk(path, sum(spec.nbytes for spec in planned))
    return ShardSink(index, dict(zip(names, shards, strict=True)), metadata, force=force)


class ShardSink(Aborting):
    """A TensorSink of several files and an index."""

    def __init__(
        self,
        path: Path,
        shards: Mapping[str, Sequence[TensorSpec]],
        metadata: Mapping[str, Any],
        *,
        force: bool,
    ) -> None:
        self.path = path
        self._where = {spec.key: name for name, specs in shards.items() for spec in specs}
        self._sinks: dict[str, FlatSink] = {}
        self._tensor_nbytes = sum(spec.nbytes for specs in shards.values() for spec in specs)
        try:
            for name, specs in shards.items():
                file = path.with_name(name)
                self._sinks[name] = safetensors.create(file, specs, metadata, force=force)
        except BaseException:
            self.abort()
            raise
        self.nbytes = sum(sink.nbytes for sink in self._sinks.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """What `commit` makes: the index, then the shards."""
        return (self.path, *map(self.path.with_name, self._sinks))

    def write(self, key: str, offset: int, data: ByteArray) -> None:
        """Write bytes at `offset` inside the tensor `key`."""
        if key not in self._where:
            raise PlanMismatch(f"{self.path}: tensor {key!r} was not planned")
        self._sinks[self._where[key]].write(key, offset, data)

    def patch_metadata(self, key: str, value: str) -> None:
        """Replace a metadata string in every shard."""
        for sink in self._sinks.values():
            sink.patch_metadata(key, value)

    def commit(self) -> tuple[Path, ...]:
        """Give every shard its name, then the index; return all of them, the index first."""
        for sink in self._sinks.values():
            sink.commit()
        index = {"metadata": {"total_size": self._tensor_nbytes}, "weight_map": self._where}
        text = (json.dumps(index, indent=2) + "\n").encode()
        file = PartialFile(self.path, len(text))
        try:
            file.write(0, memoryview(text))
            file.commit()
        except BaseException:
            file.abort()
            raise
        return self.files

    def abort(self) -> None:
        """Remove what was written and has no name yet; harmless after a commit."""
        for sink in self._sinks.values():
            sink.abort()
