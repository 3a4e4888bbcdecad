"""TensorSpec, the two protocols that every container implements, and how their contexts end.

A tensor is addressed by key and, for streaming, by a half-open range of rows. A *row* is one slice
along the first dimension of a tensor with two or more dimensions; a tensor with fewer dimensions is
a single row. Rows are contiguous bytes, so a range of rows is a range of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from diffquant.core.dtypes import storage_nbytes

__all__ = ["Aborting", "ByteArray", "Closing", "TensorSink", "TensorSource", "TensorSpec"]

ByteArray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (a STORAGE name) and shape (outermost dimension first) of one stored tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return storage_nbytes(self.dtype, self.shape)

    @property
    def rows(self) -> int:
        """Rows a reader may ask for: the first dimension, or 1 below two dimensions."""
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def row_size(self) -> int:
        """Elements per row."""
        return self.size // self.rows if self.rows else 0

    @property
    def row_nbytes(self) -> int:
        """Bytes per row."""
        return self.nbytes // self.rows if self.rows else 0


class TensorSource(Protocol):
    """An opened checkpoint: header known, bytes on demand. Reads are thread-safe.

    Attributes:
        path: the file or folder.
        container: the CONTAINERS row that reads it.
        specs: key -> spec, in file order. In a folder, keys are "subfolder/key".
        metadata: the header's own key-value pairs (values are str, or GGUF's typed values).
        configs: JSON files beside the tensors ("unet/config.json" -> object), else empty.
        nbytes: bytes on disk of all tensor files.
    """

    path: Path
    container: str
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, Any]
    configs: Mapping[str, Any]
    nbytes: int

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        ...

    def close(self) -> None:
        """Release files and maps; reading afterwards is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class TensorSink(Protocol):
    """An output being written: every spec known, header first, then bytes in any order.

    Nothing exists under the target's name until `commit`. Leaving the context without a commit, for
    whatever reason, removes the temporary file.
    """

    path: Path
    nbytes: int

    def write(self, key: str, offset: int, data: ByteArray) -> None:
        """Write bytes at `offset` inside the tensor `key`. Thread-safe; regions do not overlap."""
        ...

    def patch_metadata(self, key: str, value: str) -> None:
        """Replace a metadata string by another of exactly the same length (hashes)."""
        ...

    def commit(self) -> tuple[Path, ...]:
        """Check that every byte was written, sync, rename over the target; return the files."""
        ...

    def abort(self) -> None:
        """Remove what was written; harmless after a commit."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Closing:
    """A source's context: leaving it closes the source."""

    __slots__ = ()

    def close(self) -> None:
        """Release what is open."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Aborting:
    """A sink's context: leaving it removes what was not committed."""

    __slots__ = ()

    def abort(self) -> None:
        """Remove what was written; harmless after a commit."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
