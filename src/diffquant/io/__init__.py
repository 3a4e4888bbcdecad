"""Bytes in, bytes out: one file per container, one row in CONTAINERS for each.

`open_source` looks at what a file holds, not at what it is called: a renamed file opens all the
same. `open_sink` goes by the extension, since nothing else is known yet. No torch here.

Reading: `with open_source(path) as source: source.read(key, rows)`.
Writing: `with open_sink(path, specs, metadata) as sink:`, then `sink.write(key, offset, data)`
until every byte is there, then `sink.commit()`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.errors import CheckpointError, UnsupportedContainer, UsageError
from diffquant.core.tensors import TensorSink, TensorSource, TensorSpec
from diffquant.io import (
    diffusers_folder,
    folder_sink,
    gguf,
    safetensors,
    shard_sink,
    sharded,
    torch_pickle,
)
from diffquant.io.atomic import FlatSink
from diffquant.io.gguf_values import GgufArray, GgufValue
from diffquant.io.kept import Claim, KeptFile
from diffquant.io.locations import held, locate

__all__ = [
    "CONTAINERS",
    "Container",
    "GgufArray",
    "GgufValue",
    "file_nbytes",
    "open_resumable",
    "open_sink",
    "open_source",
]

_HEAD_NBYTES = 64


@dataclass(frozen=True, slots=True)
class Container:
    """One container.

    Attributes:
        name: what `TensorSource.container` says.
        extensions: file name endings, "" for a folder.
        sniff: (path, first 64 bytes) -> whether it is one, by content.
        open: path -> source.
        create: (path, specs, metadata, force=...) -> sink; None where we only read.
        sized: (specs, metadata) -> bytes of the file that `create` makes; None where that is more
            than one file.
    """

    name: str
    extensions: tuple[str, ...]
    sniff: Callable[[Path, bytes], bool]
    open: Callable[[Path], TensorSource]
    create: Callable[..., TensorSink] | None = None
    sized: Callable[[Sequence[TensorSpec], Mapping[str, Any]], int] | None = None


# In the order in which content is tried.
CONTAINERS: dict[str, Container] = {
    row.name: row
    for row in (
        Container("gguf", (".gguf",), gguf.sniff, gguf.open_file, gguf.create, gguf.file_nbytes),
        Container(
            "safetensors",
            (".safetensors", ".sft"),
            safetensors.sniff,
            safetensors.open_file,
            safetensors.create,
            safetensors.file_nbytes,
        ),
        Container(
            "torch_pickle",
            (".ckpt", ".pt", ".pth", ".bin"),
            torch_pickle.sniff,
            torch_pickle.open_file,
        ),
        Container("sharded", (".index.json",), sharded.sniff, sharded.open_index),
        Container(
            "diffusers_folder",
            ("",),
            diffusers_folder.sniff,
            diffusers_folder.open_folder,
            folder_sink.create,
        ),
    )
}

# What people download instead of a checkpoint.
_STRANGERS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<", "a web page or XML, not a checkpoint: the download went wrong"),
    (b"FUGG", "a big-endian GGUF, only little-endian is read"),
    (b"lmgg", "a ggml file from before GGUF, which is not read"),
    (b"tjgg", "a ggml file from before GGUF, which is not read"),
    (b"fmgg", "a ggml file from before GGUF, which is not read"),
    (b"\x89HDF", "an HDF5 file, which is not read"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
)


def open_source(path: str | Path) -> TensorSource:
    """Open a checkpoint: a file of any container, or a folder, here or on a server.

    A folder is a Diffusers pipeline or component, or holds one shard index or one safetensors file.
    `hf://owner/repo[/file][@rev]` and https links are read by range requests; see remote_name.

    Raises:
        CheckpointError: no such file, or a folder without a checkpoint.
        RemoteError, SeveralCheckpoints: the server refuses, or the repository holds several.
        UnsupportedContainer: neither content nor extension is one of CONTAINERS.
        MalformedFile, TruncatedFile, UnsafePickle: the container's own rules are broken.
    """
    path = locate(path)
    with held(path):
        return _open(path)


def _open(path: Path) -> TensorSource:
    if path.is_dir():
        return _open_folder(path)
    if path.exists() and not path.is_file():
        raise CheckpointError("not a regular file: a pipe or device cannot be read", path=path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_NBYTES)
    except FileNotFoundError:
        raise CheckpointError("no such file", path=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}", path=path) from error
    for row in CONTAINERS.values():
        if row.sniff(path, head):
            return row.open(path)
    for magic, meaning in _STRANGERS:
        if head.startswith(magic):
            raise UnsupportedContainer(f"this is {meaning}", path=path)
    for row in CONTAINERS.values():
        if any(ending and path.name.lower().endswith(ending) for ending in row.extensions):
            return row.open(path)
    raise UnsupportedContainer(
        f"not a checkpoint that is read here (starts with {head[:8]!r}; known: "
        f"{', '.join(CONTAINERS)})",
        path=path,
    )


def _open_folder(path: Path) -> TensorSource:
    if diffusers_folder.sniff(path, b""):
        return diffusers_folder.open_folder(path)
    weights = diffusers_folder.find_weights(path)
    if weights is None:
        raise CheckpointError(
            "no checkpoint in this folder: expected model_index.json, a shard index or one "
            "safetensors file",
            path=path,
        )
    return open_source(weights)


def open_sink(
    path: str | Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    configs: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_nbytes: int = 0,
) -> TensorSink:
    """Open an output: `.safetensors`, `.gguf`, or a Diffusers folder where there is no extension.

    Args:
        path: the target; an existing folder, or a path that ends with a slash, is a folder too.
        specs: tensors in the order they are to have.
        metadata: text to text; in GGUF also what `gguf_values` lists.
        force: whether an existing target may be replaced.
        configs: relative path -> JSON object; folders only.
        files: relative path -> bytes; folders only.
        shard_nbytes: bytes of tensors that a safetensors file may hold; what is more is cut into
            shards with an index beside them. 0 for files of any size.

    Raises:
        UsageError: unknown extension, the target exists, or side files for a single file.
        ResourceError: not enough disk.
    """
    target = Path(path)
    row = CONTAINERS[_sink_container(target, as_folder=str(path).endswith(("/", os.sep)))]
    if row.create is None:
        raise UsageError(f"{target}: {row.name} is only read, write .safetensors or .gguf")
    if row.name == "diffusers_folder":
        return row.create(
            target,
            specs,
            metadata,
            force=force,
            configs=configs,
            files=files,
            shard_nbytes=shard_nbytes,
        )
    if configs or files:
        raise UsageError(f"{target}: a single file takes no configs or side files")
    planned = tuple(specs)
    if 0 < shard_nbytes < sum(spec.nbytes for spec in planned):
        if row.name != "safetensors":
            raise UsageError(f"{target}: only safetensors files are cut into shards here")
        return shard_sink.create(target, planned, metadata, limit=shard_nbytes, force=force)
    return row.create(target, planned, metadata, force=force)


def file_nbytes(container: str, specs: Sequence[TensorSpec], metadata: Mapping[str, Any]) -> int:
    """Bytes of the single file that `open_sink` makes of these: header, padding and all.

    Raises:
        UsageError: the container is no single file that is written here.
    """
    sized = CONTAINERS[container].sized
    if sized is None:
        raise UsageError(f"{container}: not a single file, whose size can be told beforehand")
    return sized(specs, metadata)


def open_resumable(
    claim: Claim, specs: Iterable[TensorSpec], metadata: Mapping[str, Any], *, force: bool = False
) -> FlatSink:
    """Open a single-file output in the file that `claim` holds; leaving it unfinished keeps it.

    Raises:
        UsageError: the target is a folder, has an unknown extension, or exists.
        ResourceError: not enough disk.
    """
    row = CONTAINERS[_sink_container(claim.target, as_folder=False)]
    if row.name == "diffusers_folder" or row.create is None:
        raise UsageError(f"{claim.target}: --resume writes .safetensors and .gguf files only")
    file = functools.partial(KeptFile, claim=claim)
    sink = row.create(claim.target, specs, metadata, force=force, file=file)
    assert isinstance(sink, FlatSink)
    return sink


def _sink_container(target: Path, *, as_folder: bool) -> str:
    suffix = target.suffix.lower()
    known = {ending: row.name for row in CONTAINERS.values() for ending in row.extensions}
    if target.is_dir() or as_folder:
        if suffix in known and suffix:
            raise UsageError(f"{target}: is a folder, {suffix} asks for a file")
        return "diffusers_folder"
    if suffix[1:].isdigit():  # stable-diffusion-v1.5
        suffix = ""
    if suffix not in known:
        raise UsageError(
            f"{target}: unknown extension {suffix!r}, write .safetensors, .gguf, or a folder "
            "(no extension)"
        )
    return known[suffix]
