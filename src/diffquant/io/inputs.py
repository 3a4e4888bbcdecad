"""Statistics of what layers are fed: their mean input and its covariance, in one safetensors file.

Per layer, named by its weight's canonical key, K columns of the weight as a matrix (N, K):

    <key>.mean         F32 (K,)        mean of the inputs x
    <key>.covariance   F32 (K, K)      mean of x x^T, not centred: what a weight error costs is
                                       tr(E H E^T)
                       F32 (B, b, b)   its B diagonal blocks, where K > 4096: columns i * b to
                                       (i + 1) * b each; b is the largest divisor of K up to 4096
    <key>.count        I64 ()          inputs that were averaged

The header's metadata says `diffquant.kind` = "inputs" and what was run: architecture, prompts,
steps. Made by `diffquant calibrate --inputs`; an importance matrix is the diagonal of H alone.

A file is hostile: names, shapes, dtypes and counts are checked on opening, values when they are
read. Only the layer that is asked for is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    UnsupportedContainer,
    UsageError,
    shorten,
)
from diffquant.core.tensors import Closing, TensorSpec
from diffquant.io import safetensors
from diffquant.io.atomic import check_parent
from diffquant.io.reading import FlatSource

__all__ = [
    "KIND",
    "LARGEST_BLOCK",
    "InputsFile",
    "LayerInputs",
    "check_inputs_target",
    "covariance_shape",
    "open_inputs",
    "write_inputs",
]

KIND = "inputs"
LARGEST_BLOCK = 4096  # 64 MiB of float32
_FIELDS = ("mean", "covariance", "count")
_DTYPES = {"mean": "F32", "covariance": "F32", "count": "I64"}


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one layer was fed.

    Attributes:
        mean: (K,) float32.
        covariance: (K, K) or (B, b, b) float32; see `covariance_shape`.
        count: inputs that were averaged.
    """

    mean: NDArray[np.float32]
    covariance: NDArray[np.float32]
    count: int


def covariance_shape(columns: int) -> tuple[int, ...]:
    """The shape in which the covariance of so many columns is kept."""
    if columns <= LARGEST_BLOCK:
        return columns, columns
    blocks = next(
        n for n in range(2, columns + 1) if not columns % n and columns // n <= LARGEST_BLOCK
    )
    return blocks, columns // blocks, columns // blocks


class InputsFile(Closing):
    """An open file of input statistics; `columns` maps a layer's key to K."""

    def __init__(self, source: FlatSource) -> None:
        """Check every name, dtype, shape and count.

        Raises:
            UnsupportedContainer: the file is no statistics of inputs.
            MalformedFile: an entry breaks the layout above.
        """
        self.path = source.path
        self.metadata: Mapping[str, str] = source.metadata
        self.source = source
        if source.metadata.get("diffquant.kind") != KIND:
            raise UnsupportedContainer(
                f"{source.path}: no statistics of layer inputs (diffquant.kind is "
                f"{source.metadata.get('diffquant.kind')!r}, {KIND!r} expected); "
                "`diffquant calibrate --inputs` makes such a file"
            )
        self.columns: Mapping[str, int] = {}
        layers: dict[str, dict[str, TensorSpec]] = {}
        for key, spec in source.specs.items():
            layer, _, what = key.rpartition(".")
            if what not in _FIELDS or not layer:
                raise MalformedFile(f"{key!r} is none of {_FIELDS}", path=self.path)
            layers.setdefault(layer, {})[what] = spec
        self.columns = {layer: self._checked(layer, found) for layer, found in layers.items()}

    def _checked(self, layer: str, found: Mapping[str, TensorSpec]) -> int:
        missing = [what for what in _FIELDS if what not in found]
        if missing:
            raise MalformedFile(f"{layer!r} has no {shorten(missing)}", path=self.path)
        shape = found["mean"].shape
        columns = math.prod(shape)
        expected = {"mean": (columns,), "covariance": covariance_shape(columns), "count": ()}
        for what, spec in found.items():
            if not columns or spec.dtype != _DTYPES[what] or spec.shape != expected[what]:
                raise MalformedFile(
                    f"{spec.key!r} is {spec.dtype} {spec.shape}, expected {_DTYPES[what]} "
                    f"{expected[what]} of at least one column",
                    path=self.path,
                )
        count = int(self._read(layer, "count", np.int64)[()])
        if count < 1:
            raise MalformedFile(
                f"{layer!r} was measured on {count} inputs, at least 1 expected", path=self.path
            )
        return columns

    def _read(self, layer: str, what: str, kind: type) -> NDArray[np.generic]:
        key = f"{layer}.{what}"
        return self.source.read(key).view(kind).reshape(self.source.specs[key].shape)

    def mean(self, layer: str) -> NDArray[np.float32]:
        """Mean input of a layer, (K,).

        Raises:
            MalformedFile: a value that is not finite.
        """
        return self._finite(layer, "mean")

    def covariance(self, layer: str) -> NDArray[np.float32]:
        """Mean of x x^T, (K, K) or (B, b, b).

        Raises:
            MalformedFile: a value that is not finite, or a negative one on the diagonal.
        """
        values = self._finite(layer, "covariance")
        if (np.diagonal(values, axis1=-2, axis2=-1) < 0).any():
            raise MalformedFile(
                f"covariance of {layer!r} is negative on its diagonal, where squares stand",
                path=self.path,
            )
        return values

    def count(self, layer: str) -> int:
        """How many inputs were averaged."""
        return int(self._read(layer, "count", np.int64)[()])

    def _finite(self, layer: str, what: str) -> NDArray[np.float32]:
        values = self._read(layer, what, np.float32).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise MalformedFile(f"{what} of {layer!r} is not finite", path=self.path)
        return values

    def close(self) -> None:
        """Close the file."""
        self.source.close()


def open_inputs(path: Path) -> InputsFile:
    """Open a file of input statistics.

    Raises:
        CheckpointError: no safetensors file, or one that holds something else.
    """
    source = safetensors.open_file(path)
    try:
        return InputsFile(source)
    except BaseException:
        source.close()
        raise


def check_inputs_target(path: Path, *, force: bool = False) -> None:
    """Check that statistics can be written to `path`, before the work of making them.

    Raises:
        UsageError: another extension, no such folder, or the file exists and `force` is not given.
    """
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path}: statistics of layer inputs are written as .safetensors")
    check_parent(path)
    if path.exists() and not force:
        raise UsageError(f"{path} exists; use --force to replace it")


def write_inputs(
    path: Path,
    layers: Mapping[str, LayerInputs],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
) -> None:
    """Write statistics, layers sorted by name.

    Raises:
        UsageError: see `check_inputs_target`.
        PlanMismatch: a layer whose arrays do not have the shapes above.
        ResourceError: not enough disk.
    """
    check_inputs_target(path, force=force)
    specs, data = [], {}
    for layer, one in sorted(layers.items()):
        if one.mean.ndim != 1 or one.covariance.shape != covariance_shape(one.mean.size):
            raise PlanMismatch(
                f"{layer}: mean {one.mean.shape} and covariance {one.covariance.shape} differ"
            )
        for what, dtype, values in (
            ("mean", "F32", one.mean.astype(np.float32, copy=False)),
            ("covariance", "F32", one.covariance.astype(np.float32, copy=False)),
            ("count", "I64", np.array(one.count, np.int64)),
        ):
            specs.append(TensorSpec(f"{layer}.{what}", dtype, values.shape))
            data[specs[-1].key] = values
    header = {"diffquant.kind": KIND, **metadata}
    with safetensors.create(path, specs, header, force=force) as sink:
        for key, values in data.items():
            sink.write(key, 0, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        sink.commit()
