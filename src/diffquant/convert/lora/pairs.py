"""Factors of a LoRA as matrices, and numbers as the bytes of a LoRA file.

delta = scale * up @ down       up (N, r), down (r, K): kernels are flat rows here
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.lora.group import Adapter
from diffquant.core.errors import MalformedFile, QuantError
from diffquant.core.floats import PLAIN_FLOATS, float32_of
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.io import safetensors
from diffquant.quant.backends import backend
from diffquant.quant.formats import format_named

__all__ = ["Matrix", "Pair", "read_pair", "read_part", "scale_of", "stored_bytes", "write"]

Matrix = NDArray[np.float32]


class Pair(NamedTuple):
    """The factors of one layer, and what their product is multiplied by."""

    up: Matrix
    down: Matrix
    scale: float


def scale_of(adapter: Adapter) -> float:
    """What the delta is multiplied by at weight 1."""
    if adapter.alpha is None or not adapter.rank:
        return 1.0
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rooted else adapter.rank)


def read_pair(source: TensorSource, adapter: Adapter) -> Pair:
    """Read up (N, r) and down (r, K) of a LoRA or LoCon without a core, as float32.

    Raises:
        MalformedFile: NaN or infinity in them.
    """
    up, down = read_part(source, adapter, "up"), read_part(source, adapter, "down")
    return Pair(up.reshape(len(up), -1), down.reshape(len(down), -1), scale_of(adapter))


def read_part(source: TensorSource, adapter: Adapter, role: str) -> Matrix:
    """Read one part of an adapter as float32, in its shape.

    Raises:
        MalformedFile: it is of no floating point dtype, or has NaN or infinity.
    """
    spec = source.specs[adapter.parts[role]]
    if spec.dtype not in PLAIN_FLOATS:
        raise MalformedFile(
            f"{spec.key}: expected {' or '.join(PLAIN_FLOATS)}, found {spec.dtype}",
            path=source.path,
        )
    values = float32_of(source.read(spec.key), spec.dtype).reshape(spec.shape)
    if not np.isfinite(values).all():
        raise MalformedFile(f"{spec.key}: NaN or infinity in a LoRA", path=source.path)
    return values


def stored_bytes(key: str, dtype: str, values: Matrix) -> ByteArray:
    """Numbers as F32, F16 or BF16 bytes, rounded half to even.

    Raises:
        QuantError: a number that the dtype cannot hold.
    """
    fmt = format_named(dtype.lower())
    rows = np.ascontiguousarray(values, np.float32).reshape(1, -1)
    stored = backend(fmt.codec, "encode")(rows, None, fmt=fmt.name)["weight"]
    if dtype == "F16" and not np.isfinite(stored).all():
        raise QuantError(
            f"{key}: values up to {np.abs(rows).max():.3g} overflow float16; use --dtype bf16"
        )
    found: ByteArray = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    return found


def write(
    path: Path,
    specs: Iterable[TensorSpec],
    layers: Iterable[Mapping[str, Matrix | ByteArray]],
    metadata: Mapping[str, str],
    *,
    force: bool,
    progress: Progress = NO_PROGRESS,
) -> int:
    """Write a LoRA layer by layer, whole or not at all.

    Args:
        path: a safetensors file.
        specs: every tensor.
        layers: of each, key -> float32 numbers, or bytes as they are stored.
        metadata: of the header.
        force: replace an existing file.
        progress: told about bytes.

    Returns:
        Bytes of all tensors.
    """
    known = {spec.key: spec for spec in specs}
    total = sum(spec.nbytes for spec in known.values())
    progress.start("LoRA", total)
    try:
        with safetensors.create(path, known.values(), dict(metadata), force=force) as sink:
            for layer in layers:
                for key, values in layer.items():
                    sink.write(key, 0, _bytes(known[key], values))
                    progress.advance(known[key].nbytes, key)
            sink.commit()
    finally:
        progress.stop()
    return total


def _bytes(spec: TensorSpec, values: Matrix | ByteArray) -> ByteArray:
    """Bytes as they are; numbers in the dtype that is written."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return stored_bytes(spec.key, spec.dtype, np.asarray(values, np.float32))
