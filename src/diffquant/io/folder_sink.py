"""Writing a Diffusers folder: built beside its target, swapped in by two renames.

Everything goes to `.<name>.partial-<pid>-<random>/`, one safetensors file per component. `commit`
syncs, moves an existing folder to `.<name>.old-...`, gives the new one its name, and removes the
old one. Between the two renames nothing has the name; a process killed there is repaired when
the target is next opened for writing (`atomic.remove_stale`).

Sources: huggingface/diffusers@58eb52c src/diffusers/utils/constants.py (file names); transformers
reads safetensors only with the metadata {"format": "pt"} (modeling_utils.py, load_state_dict).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from diffquant.core.errors import CheckpointError, PlanMismatch, UsageError
from diffquant.core.tensors import Aborting, ByteArray, TensorSpec
from diffquant.io import safetensors, shard_sink
from diffquant.io.atomic import (
    FlatSink,
    check_disk,
    check_parent,
    disk_errors,
    partial_path,
    remove_stale,
    sync_folder,
    unique_specs,
)
from diffquant.io.diffusers_folder import sniff
from diffquant.io.sharded import plain_name

__all__ = ["FolderSink", "component_file", "create"]

_TRANSFORMERS = ("text_encoder", "image_encoder", "safety_checker", "vision_encoder")


def component_file(component: str) -> str:
    """Name a component's tensor file, as the library that loads it expects."""
    if component.startswith(_TRANSFORMERS):
        return f"{component}/model.safetensors"
    return f"{component}/diffusion_pytorch_model.safetensors".lstrip("/")


def create(
    path: Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    configs: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_nbytes: int = 0,
) -> FolderSink:
    """Open a folder for writing.

    Args:
        path: the target folder.
        specs: keys "component/key"; or, all of them, bare keys for a bare component.
        metadata: text to text, written to every component's file; `format` defaults to "pt".
        force: whether an existing folder may be replaced, whole.
        configs: relative path -> JSON object.
        files: relative path -> bytes.
        shard_nbytes: bytes of tensors that a component's file may hold before it is cut; 0 for any.

    Raises:
        UsageError: the target exists, or is no Diffusers folder that may be replaced.
        PlanMismatch: a component or a path that does not stay inside the folder.
        ResourceError: the disk is too small.
    """
    planned = unique_specs(specs)
    check_parent(path)
    remove_stale(path)
    _check_folder(path, force=force)
    sides = {**{name: _as_json(item) for name, item in (configs or {}).items()}, **(files or {})}
    for name in sides:
        parts = PurePosixPath(name).parts
        if not parts or not all(plain_name(part) for part in parts):
            raise PlanMismatch(f"{path}: side file {name!r} does not stay inside the folder")
    groups = _by_component(path, planned)
    check_disk(path, sum(spec.nbytes for spec in planned) + sum(map(len, sides.values())))
    return FolderSink(path, groups, {"format": "pt", **metadata}, sides, shard_nbytes)


def _as_json(item: object) -> bytes:
    return (json.dumps(item, indent=2, ensure_ascii=False) + "\n").encode()


def _check_folder(path: Path, *, force: bool) -> None:
    """Refuse to replace anything but an empty folder or, with force, a Diffusers folder."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path}: is a file, a folder was asked for")
    if not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"{path}: exists already, pass --force to replace it")
    if not sniff(path, b""):
        raise UsageError(f"{path}: is no Diffusers folder, remove it yourself or choose a new name")


def _by_component(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, list[TensorSpec]]:
    """Group specs by component, keys without their prefix."""
    groups: dict[str, list[TensorSpec]] = {}
    bare = not any("/" in spec.key for spec in specs)
    for spec in specs:
        component, _, key = ("", "", spec.key) if bare else spec.key.partition("/")
        if not bare and (not key or not plain_name(component) or component.startswith(".")):
            raise PlanMismatch(f"{path}: {spec.key!r} does not start with a component's name")
        groups.setdefault(component, []).append(TensorSpec(key, spec.dtype, spec.shape))
    return groups


class FolderSink(Aborting):
    """A TensorSink of several files in one folder."""

    def __init__(
        self,
        path: Path,
        groups: Mapping[str, list[TensorSpec]],
        metadata: Mapping[str, Any],
        sides: Mapping[str, bytes],
        shard_nbytes: int,
    ) -> None:
        self.path = path
        self._folder = partial_path(path)
        self._sinks: dict[str, FlatSink | shard_sink.ShardSink] = {}
        self._names = tuple(sides)
        self._state = "open"
        try:
            with disk_errors(path, sum(map(len, sides.values()))):
                self._folder.mkdir()
                for name in (*map(component_file, groups), *sides):
                    (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                for name, content in sides.items():
                    _write_synced(self._folder / name, content)
            for component, specs in groups.items():
                file = self._folder / component_file(component)
                if 0 < shard_nbytes < sum(spec.nbytes for spec in specs):
                    self._sinks[component] = shard_sink.create(
                        file, specs, metadata, limit=shard_nbytes
                    )
                else:
                    self._sinks[component] = safetensors.create(file, specs, metadata)
        except BaseException:
            self.abort()
            raise
        self.nbytes = sum(sink.nbytes for sink in self._sinks.values())
        self.nbytes += sum(map(len, sides.values()))

    def write(self, key: str, offset: int, data: ByteArray) -> None:
        """Write bytes at `offset` inside the tensor `key` ("component/key")."""
        component, _, inner = ("", "", key) if "" in self._sinks else key.partition("/")
        if component not in self._sinks:
            raise PlanMismatch(f"{self.path}: tensor {key!r} was not planned")
        self._sinks[component].write(inner, offset, data)

    def patch_metadata(self, key: str, value: str) -> None:
        """Replace a metadata string in every component's file."""
        for sink in self._sinks.values():
            sink.patch_metadata(key, value)

    def commit(self) -> tuple[Path, ...]:
        """Check and sync every file, then swap the folder in; return its files."""
        if self._state != "open":
            raise PlanMismatch(f"{self.path}: used after it was {self._state}")
        made = [file for sink in self._sinks.values() for file in sink.commit()]
        names = [file.relative_to(self._folder).as_posix() for file in made]
        self._names = (*names, *self._names)
        for folder in {(self._folder / name).parent for name in self._names} | {self._folder}:
            sync_folder(folder)
        try:
            self._swap()
        except OSError as error:
            raise CheckpointError(
                f"cannot be replaced: {error.strerror}", path=self.path
            ) from error
        self._state = "committed"
        return tuple(self.path / name for name in self._names)

    def _swap(self) -> None:
        old: Path | None = None
        if self.path.exists():
            old = self.path.rename(partial_path(self.path, "old"))
        try:
            self._folder.rename(self.path)
        except BaseException:
            if old is not None:
                old.rename(self.path)
            raise
        sync_folder(self.path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Remove what was written; harmless after a commit."""
        if self._state != "open":
            return
        self._state = "aborted"
        for sink in self._sinks.values():
            sink.abort()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
