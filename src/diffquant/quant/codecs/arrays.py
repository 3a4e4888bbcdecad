"""Array types that every codec speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bytes", "Decode", "Encode", "Float32", "Int32", "Parts", "frozen"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Parts = dict[str, NDArray[Any]]


def frozen(array: NDArray[Any], shape: int | tuple[int, ...]) -> NDArray[Any]:
    """View an array as a kernel's input: of exactly `shape`, aligned, C-contiguous, read-only.

    Numba compiles a kernel anew for every other combination of these, seconds each; and a kernel
    does not check bounds, so sizes are checked here.

    Raises:
        ValueError: the array has another number of elements.
    """
    view = np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"]).reshape(shape)
    view = view.view()  # never the caller's own object
    view.flags.writeable = False
    return view


class Encode(Protocol):
    """Rows of a weight to the parts they are stored as."""

    def __call__(
        self,
        weight: Float32,
        stats: float | None = None,
        *,
        fmt: str,
        importance: Float32 | None = None,
    ) -> Parts:
        """Encode `weight`, float32 (R, K), C-contiguous; `importance` is one value per column."""
        ...


class Decode(Protocol):
    """Stored parts back to rows."""

    def __call__(
        self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str
    ) -> Float32:
        """Decode to float32 of `shape`, (R, K)."""
        ...
