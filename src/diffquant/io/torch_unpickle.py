"""Unpickle what torch.save wrote, without torch: an allow-list, and stubs behind every name on it.

`load` first reads the opcodes (`pickle_scan`); a name outside the allow-list is refused there, so
nothing has run. Only then a `pickle.Unpickler` runs, whose `find_class` knows the same list and
returns our own inert objects: storages become keys, tensors become (storage, offset, shape,
strides), hooks and optimizer leftovers become `Opaque`.

Sources: pytorch/pytorch torch/_weights_only_unpickler.py (names that torch itself calls harmless),
torch/_utils.py (`_rebuild_tensor_v2` and kin), torch/serialization.py (`persistent_load`).
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.dtypes import storage
from diffquant.core.errors import MalformedFile, UnsafePickle, UnsupportedDtype, shorten
from diffquant.io.pickle_scan import Scan, scan
from diffquant.io.reading import checked_shape

__all__ = ["MAX_PICKLE_NBYTES", "StorageRef", "TensorRef", "checked_scan", "load"]

MAX_PICKLE_NBYTES = 64 << 20  # of what `load` is given
_MAX_COPIED = 4_000_000  # elements that constructors may copy while one pickle loads
_MAX_EXPANDED_NBYTES = 16 << 20  # a tensor may exceed its storage (stride 0) up to this size

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_DTYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# Named by the allow-list but not in STORAGE.
_UNSUPPORTED = (
    "complex32", "complex64", "complex128", "ComplexFloatStorage", "ComplexDoubleStorage",
    "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage",
    "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """One storage of the file: `numel` elements of `dtype` under `key`."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * storage(self.dtype).block_nbytes


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A view of a storage; `offset` and `strides` count elements of `dtype`."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Inert:
    """An object on which BUILD does nothing, and which cannot be changed by a pickle."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class Opaque(_Inert):
    """Something the file holds that is not a tensor and is not read."""

    __slots__ = ()


class _OrderedDict(dict[Any, Any]):
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore attributes such as `_metadata`."""


class _Dtype(_Inert):
    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _StorageType(_Dtype):
    __slots__ = ()


class _Function(_Inert):
    """A callable whose name is on the list; REDUCE calls it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)


def load(
    data: bytes, path: Path, *, found: Scan | None = None
) -> tuple[object, dict[str, StorageRef]]:
    """Unpickle one pickle.

    Args:
        data: the pickle.
        path: the file, for messages.
        found: what `checked_scan` said about it, where it is known.

    Returns:
        Dicts, lists, scalars, TensorRef and Opaque; and every storage that was mentioned, by key.

    Raises:
        UnsafePickle: it names something outside the allow-list; nothing was run.
        MalformedFile: no valid pickle, or tensors outside their storages.
        UnsupportedDtype: complex or quantized tensors.
    """
    try:
        if found is None:
            checked_scan(data, path)
        unpickler = _Unpickler(data, path)
        return unpickler.load(), unpickler.storages
    except MalformedFile as error:
        raise error if error.path else MalformedFile(str(error), path=path) from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise MalformedFile(
            f"pickle cannot be read: {type(error).__name__}: {error}", path=path
        ) from None


def checked_scan(data: bytes, path: Path) -> Scan:
    """Walk the opcodes of the pickle at the start of `data`, and refuse forbidden names.

    Raises:
        UnsafePickle: it names something outside the allow-list, whether it is whole or broken.
        MalformedFile: it is no valid pickle.
        EOFError: it goes on after the end of `data`.
    """
    names: set[str] = set()
    try:
        return scan(data, names)
    except MalformedFile as error:
        raise MalformedFile(str(error), path=path) from None
    finally:
        _refuse(names, path)


def _refuse(names: set[str], path: Path) -> None:
    refused = tuple(sorted(name for name in names if name not in _ALLOWED))
    if refused:
        raise UnsafePickle(
            f"pickle refused, nothing of it was run: it asks for {shorten(refused, 20)}; "
            "get a safetensors file, or convert it on a machine you can lose",
            path=path,
            names=refused,
        )


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, StorageRef] = {}
        self._path = path
        self._copied = 0

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Return the stub for an allowed name."""
        name = f"{module_name}.{global_name}"
        stub = _ALLOWED.get(name)
        if stub is None:
            raise UnsafePickle(f"pickle asks for {name}", path=self._path, names=(name,))
        if isinstance(stub, _Unsupported):
            raise UnsupportedDtype(f"{self._path}: holds {name}, which is not supported")
        return stub.bind(self) if isinstance(stub, _PerLoad) else stub

    def persistent_load(self, pid: object) -> StorageRef:
        """Turn ("storage", type, key, location, numel[, view]) into a StorageRef."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise MalformedFile("persistent id is no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise MalformedFile("persistent id is no storage")
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise MalformedFile(f"storage {key!r} has {numel!r:.40} elements")
        if len(pid) == 6 and pid[5] is not None:
            raise MalformedFile(f"storage {key!r} is a view, as torch before 0.4 wrote them")
        known = self.storages.setdefault(key, StorageRef(key, kind.name, numel))
        if (known.dtype, known.numel) != (kind.name, numel):
            raise MalformedFile(f"storage {key!r} is described in two ways")
        return known

    def _spend(self, count: int) -> None:
        """Bound what constructors copy: a short pickle can ask for the same copy very often."""
        self._copied += count
        if self._copied > _MAX_COPIED:
            raise MalformedFile(f"pickle copies more than {_MAX_COPIED} elements")

    def ordered_dict(self, items: object = ()) -> _OrderedDict:
        """collections.OrderedDict(items)."""
        if not isinstance(items, dict | list | tuple):
            raise MalformedFile("OrderedDict of something that is no list")
        self._spend(len(items))
        return _OrderedDict(items)

    def size(self, dims: object) -> tuple[int, ...]:
        """torch.Size(dims)."""
        return checked_shape(dims, "torch.Size", self._path)

    def encode(self, text: object, encoding: object = "latin1") -> bytes:
        """_codecs.encode, the way protocol 2 stores bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise MalformedFile("_codecs.encode with something other than latin1 text")
        self._spend(len(text))
        return text.encode("latin1")

    def tensor(self, ref: object, *place: object) -> TensorRef:
        """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (storage, offset, size, stride)."""
        if not isinstance(ref, StorageRef) or len(place) < 3:
            raise MalformedFile("tensor without a storage")
        return self._view(ref, place, ref.dtype)

    def tensor_v3(self, ref: object, *place: object) -> TensorRef:
        """torch._utils._rebuild_tensor_v3: as v2, an untyped storage, and a dtype in place 6."""
        if not isinstance(ref, StorageRef) or len(place) < 6 or type(place[5]) is not _Dtype:
            raise MalformedFile("tensor without a storage or a dtype")
        return self._view(ref, place, place[5].name)

    def _view(self, ref: StorageRef, place: tuple[object, ...], dtype: str) -> TensorRef:
        """Check (offset, size, stride) against the storage."""
        what = f"a tensor of storage {ref.key!r}"
        shape = checked_shape(place[1], what, self._path)
        (offset,) = _counts((place[0],), what)
        strides = _counts(place[2], what)
        if len(strides) != len(shape):
            raise MalformedFile(f"{what} has {len(shape)} dimensions and {len(strides)} strides")
        itemsize = storage(dtype).block_nbytes
        if 0 not in shape:
            last = offset + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
            if (last + 1) * itemsize > ref.nbytes:
                raise MalformedFile(
                    f"{what} ends at byte {(last + 1) * itemsize}, the storage has {ref.nbytes}"
                )
            if math.prod(shape) * itemsize > max(ref.nbytes, _MAX_EXPANDED_NBYTES):
                raise MalformedFile(f"{what} repeats {ref.nbytes} bytes to {list(shape)}")
        return TensorRef(ref, offset, shape, strides, dtype)


def _counts(items: object, what: str) -> tuple[int, ...]:
    if not isinstance(items, list | tuple) or len(items) > 32:
        raise MalformedFile(f"{what} has no list of strides")
    if not all(type(item) is int and 0 <= item < 2**62 for item in items):
        raise MalformedFile(f"{what} has a negative or absurd offset or stride")
    return tuple(items)


class _Unsupported:
    """A dtype that is harmless but that STORAGE lacks."""

    __slots__ = ()


class _PerLoad:
    """A stub that belongs to one load, so that its limits do."""

    __slots__ = ("_method",)

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def bind(self, unpickler: _Unpickler) -> _Function:
        """Return the callable for one load."""
        return _Function(self._method.__get__(unpickler))


def _first(data: object, *_: object) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise MalformedFile("parameter without a tensor")
    return data


def _from_type(function: object, _type: object, args: object, *_: object) -> object:
    if not isinstance(function, _Function) or not isinstance(args, tuple):
        raise MalformedFile("tensor subclass without a function")
    return function(*args)


def _opaque(*_: object) -> Opaque:
    return Opaque()


_ALLOWED: dict[str, object] = {
    "collections.OrderedDict": _PerLoad(_Unpickler.ordered_dict),
    "torch.Size": _PerLoad(_Unpickler.size),
    "torch._utils._rebuild_tensor": _PerLoad(_Unpickler.tensor),
    "torch._utils._rebuild_tensor_v2": _PerLoad(_Unpickler.tensor),
    "torch._utils._rebuild_tensor_v3": _PerLoad(_Unpickler.tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_first),
    "torch._utils._rebuild_parameter_with_state": _Function(_first),
    "torch._tensor._rebuild_from_type_v2": _Function(_from_type),
    "torch.Tensor": Opaque(),
    "torch.nn.parameter.Parameter": Opaque(),
    "torch.device": _Function(_opaque),
    "_codecs.encode": _PerLoad(_Unpickler.encode),
    "builtins.set": _Function(_opaque),
    "__builtin__.set": _Function(_opaque),
    "numpy.dtype": _Function(_opaque),
    "numpy.core.multiarray.scalar": _Function(_opaque),
    "numpy._core.multiarray.scalar": _Function(_opaque),
    **{f"torch.{name}": _Dtype(dtype) for name, dtype in _DTYPES.items()},
    **{
        f"{module}.{name}": _StorageType(dtype)
        for module, (name, dtype) in itertools.product(
            ("torch", "torch.storage"), _STORAGES.items()
        )
    },
    **{f"torch.{name}": _Unsupported() for name in _UNSUPPORTED},
}
