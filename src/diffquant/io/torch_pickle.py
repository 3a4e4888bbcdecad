"""torch.save files, read only and without torch: `.ckpt .pt .pth .bin`.

::

    zip (torch >= 1.6)   <name>/data.pkl          the objects, tensors as references
                         <name>/data/<key>        one storage each, stored uncompressed
                         <name>/byteorder         "little"
    legacy               4 pickles: magic number, protocol 1001, system, objects
                         1 pickle: storage keys, in order
                         per key: u64 elements, then the bytes

Storages are read where they lie; only the pickle is loaded, through `torch_unpickle`'s allow-list.
Of a training checkpoint the state dict is read (`state_dict`, `model`, `module`, ...); scalars
beside it become metadata. Nested dicts and lists become dotted keys.

Sources: pytorch/pytorch torch/serialization.py (`_save`, `_legacy_save`, `MAGIC_NUMBER`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.core.dtypes import storage
from diffquant.core.errors import MalformedFile, TruncatedFile, UnsupportedContainer
from diffquant.core.tensors import ByteArray, TensorSpec
from diffquant.io.pickle_scan import Scan
from diffquant.io.reading import FlatSource, RandomFile, find_spec, open_random
from diffquant.io.torch_unpickle import (
    MAX_PICKLE_NBYTES,
    StorageRef,
    TensorRef,
    checked_scan,
    load,
)
from diffquant.io.torch_zip import ZIP_MAGIC, open_zip

__all__ = ["TorchSource", "open_file", "sniff"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_FIRST_READ_NBYTES = 1 << 20
_MAX_ENTRIES = 1_000_000
_MAX_DEPTH = 16
_MAX_NOTE = 1000
_WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema", "net",
)  # fmt: skip


class TorchSource(FlatSource):
    """A torch.save file; tensors that are strided views are made contiguous while reading."""

    views: Mapping[str, TensorRef]

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        view = self.views.get(key)
        if view is None:
            return super().read(key, rows)
        spec = find_spec(self.specs, key, self.path)
        shape, first = view.shape, view.offset
        if rows is not None and len(shape) >= 2:
            shape = (rows[1] - rows[0], *shape[1:])
            first += rows[0] * view.strides[0]
        return self._gather(spec, shape, view.strides, first)

    def _gather(
        self, spec: TensorSpec, shape: tuple[int, ...], strides: tuple[int, ...], first: int
    ) -> ByteArray:
        """Read the span that a strided view covers, and copy it into row-major order."""
        itemsize = storage(spec.dtype).block_nbytes
        if 0 in shape:
            return self._file.read(0, 0)
        span = 1 + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
        raw = self._file.read(self.offsets[spec.key] + first * itemsize, span * itemsize)
        elements = raw.view(f"V{itemsize}")
        view = np.lib.stride_tricks.as_strided(
            elements, shape, [stride * itemsize for stride in strides], writeable=False
        )
        flat = np.ascontiguousarray(view).reshape(-1).view(np.uint8)
        flat.flags.writeable = False
        return flat


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a file that starts with `head` is a zip archive or a binary pickle."""
    return head.startswith(ZIP_MAGIC) or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def open_file(path: Path) -> TorchSource:
    """Open a torch.save file; storages are read on demand.

    Raises:
        UnsafePickle: the pickle names something outside the allow-list; nothing of it was run.
        MalformedFile: no torch.save file, or one that breaks the format's rules.
        TruncatedFile: a storage ends beyond the file.
        UnsupportedContainer: TorchScript, big-endian, or no tensor at all.
        UnsupportedDtype: complex or quantized tensors.
    """
    file = open_random(path)
    try:
        if file.size >= 4 and file.read(0, 4).tobytes() == ZIP_MAGIC:
            tree, places = open_zip(file)
        else:
            tree, places = _open_legacy(file)
        tensors, notes = _pick_tensors(tree, path)
        specs: dict[str, TensorSpec] = {}
        shifts: dict[str, tuple[str, int]] = {}
        views: dict[str, TensorRef] = {}
        for key, ref in tensors.items():
            if ref.storage.key not in places:
                raise MalformedFile(f"storage {ref.storage.key!r} of {key!r} is missing", path=path)
            specs[key] = TensorSpec(key, ref.dtype, ref.shape)
            if _is_contiguous(ref):
                shifts[key] = ref.storage.key, ref.offset * storage(ref.dtype).block_nbytes
            else:
                shifts[key], views[key] = (ref.storage.key, 0), ref
    except BaseException:
        file.close()
        raise
    offsets = _Offsets(places, shifts)
    source = TorchSource(file, "torch_pickle", specs=specs, offsets=offsets, metadata=notes)
    source.views = views
    return source


class _Offsets(Mapping[str, int]):
    """Where tensors begin: the place of a storage, and how far into it."""

    def __init__(self, places: Mapping[str, int], shifts: Mapping[str, tuple[str, int]]) -> None:
        self._places = places
        self._shifts = shifts

    def __getitem__(self, key: str) -> int:
        name, shift = self._shifts[key]
        return self._places[name] + shift

    def __iter__(self) -> Iterator[str]:
        return iter(self._shifts)

    def __len__(self) -> int:
        return len(self._shifts)


def _is_contiguous(ref: TensorRef) -> bool:
    expected = 1
    for dim, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if dim != 1 and stride != expected:
            return 0 in ref.shape
        expected *= dim
    return True


def _open_legacy(file: RandomFile) -> tuple[Any, dict[str, int]]:
    """Return the unpickled objects and where each storage's bytes lie."""
    parts: list[Any] = []
    refs: dict[str, StorageRef] = {}
    position = 0
    for index in range(5):
        raw, found = _next_pickle(file, position)
        position += len(raw)
        part, mentioned = load(raw, file.path, found=found)
        if index == 0 and part != _MAGIC:
            raise MalformedFile("a pickle, but not one that torch.save wrote", path=file.path)
        parts.append(part)
        refs |= mentioned
    _, protocol, system, tree, keys = parts
    if protocol != _PROTOCOL or not isinstance(system, dict) or not isinstance(keys, list):
        raise MalformedFile("not the five pickles that torch.save writes", path=file.path)
    if system.get("little_endian") is not True:
        raise UnsupportedContainer("big-endian torch.save file", path=file.path)
    places: dict[str, int] = {}
    for key in keys:
        ref = refs.get(key) if isinstance(key, str) else None
        if ref is None or key in places:
            raise MalformedFile(f"storage {key!r:.40} belongs to no tensor", path=file.path)
        count = int.from_bytes(file.read(position, 8).tobytes(), "little")
        if count != ref.numel:
            raise MalformedFile(
                f"storage {key!r} has {count} elements, {ref.numel} expected", path=file.path
            )
        places[key] = position + 8
        position += 8 + ref.nbytes
        if position > file.size:
            raise TruncatedFile(
                f"storage {key!r} ends at byte {position}, the file has {file.size}",
                path=file.path,
            )
    return tree, places


def _next_pickle(file: RandomFile, position: int) -> tuple[bytes, Scan]:
    """Return the pickle at `position`, and what its opcodes say."""
    size = _FIRST_READ_NBYTES
    while True:
        raw = file.read(position, min(size, file.size - position)).tobytes()
        try:
            found = checked_scan(raw, file.path)
        except EOFError as error:
            if position + size >= file.size:
                raise TruncatedFile(f"{error}: download it again", path=file.path) from None
            if size >= MAX_PICKLE_NBYTES:
                raise MalformedFile(f"pickle over {size} bytes", path=file.path) from None
            size *= 4
        else:
            return raw[: found.end], found


def _walk(tree: object, path: Path) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield (names, leaf) of nested dicts, lists and tuples, in order.

    Raises:
        MalformedFile: nested more than 16 deep, or more than a million leaves.
    """
    left = _MAX_ENTRIES
    pending: list[tuple[tuple[str, ...], object]] = [((), tree)]
    while pending:
        names, item = pending.pop()
        left -= 1
        if left < 0 or len(names) > _MAX_DEPTH:
            raise MalformedFile(
                f"objects nested over {_MAX_DEPTH} deep, or over {_MAX_ENTRIES}", path=path
            )
        if isinstance(item, dict):
            pairs = [((*names, str(key)), value) for key, value in item.items()]
        elif isinstance(item, list | tuple):
            pairs = [((*names, str(index)), value) for index, value in enumerate(item)]
        else:
            yield names, item
            continue
        pending += reversed(pairs)


def _pick_tensors(tree: object, path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Return the tensors under dotted keys, and what lies beside them as text."""
    notes: dict[str, str] = {}
    for _ in range(4):
        inner = _wrapped(tree, path)
        if inner is None or not isinstance(tree, dict):
            break
        notes |= {
            str(key): _describe(value) for key, value in tree.items() if value is not tree[inner]
        }
        tree = tree[inner]
    tensors: dict[str, TensorRef] = {}
    for names, item in _walk(tree, path):
        key = ".".join(names) or "tensor"
        if isinstance(item, TensorRef):
            if key in tensors:
                raise MalformedFile(f"two tensors flatten to {key!r}", path=path)
            tensors[key] = item
        elif item is not None and not (names and names[-1] == "_metadata"):
            notes.setdefault(key, _describe(item))
    if not tensors:
        raise UnsupportedContainer("a torch.save file without any tensor", path=path)
    return tensors, notes


def _wrapped(tree: object, path: Path) -> str | None:
    """Name the entry that holds the state dict, unless tensors lie at this level."""
    if not isinstance(tree, dict) or any(isinstance(item, TensorRef) for item in tree.values()):
        return None
    for name in _WRAPPERS:
        inner = tree.get(name)
        if isinstance(inner, dict) and any(
            isinstance(item, TensorRef) for _, item in _walk(inner, path)
        ):
            return name
    return None


def _describe(value: object) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        return str(value)[:_MAX_NOTE]
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__.lstrip('_')} of {len(value)}, not read"
    return f"{type(value).__name__}, not read"
