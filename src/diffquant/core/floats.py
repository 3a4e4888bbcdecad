"""Plain floating point bytes as float32, without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UnsupportedDtype
from diffquant.core.tensors import ByteArray

__all__ = ["PLAIN_FLOATS", "float32_of"]

PLAIN_FLOATS = ("F32", "F16", "BF16")


def float32_of(raw: ByteArray, dtype: str) -> NDArray[np.float32]:
    """Numbers of an F32, F16 or BF16 tensor, flat; exact.

    Raises:
        UnsupportedDtype: any other dtype.
    """
    flat = np.ascontiguousarray(raw).reshape(-1)
    if dtype == "F32":
        return flat.view("<f4")
    if dtype == "F16":
        return flat.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise UnsupportedDtype(f"expected {' or '.join(PLAIN_FLOATS)}, found {dtype}")
