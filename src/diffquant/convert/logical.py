"""Logical tensors: a weight with whatever its file keeps beside it, read as float32 rows.

convert/binding.py folds the physical tensors of a source (weight, scales, quant_state, comfy_quant
...) into logical ones, so that recognition, rules and policies see one tensor per weight, in its
true shape. Values are decoded on read, a range of rows at a time; nothing is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.flat import flat_state, read_flat
from diffquant.convert.tiled import read_tiled
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import UnsupportedDtype
from diffquant.core.floats import float32_of
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, format_named, matrix_shape

__all__ = ["ORIG_SHAPE", "Decoder", "LogicalSource", "LogicalTensor"]

ORIG_SHAPE = "comfy.gguf.orig_shape."  # + the tensor's name as stored

_CASTS = frozenset({"", *(row.name for row in FORMATS.values() if row.is_cast)})
_SCALED_FP8 = ("fp8_e4m3_scaled", "fp8_e5m2_scaled")
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "F64": "<f8"}


# (source, half-open range of rows) -> (R, K) float32
Decoder = Callable[[TensorSource, tuple[int, int]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One weight as its users see it.

    Attributes:
        key: the source's key of the weight.
        shape: true shape.
        format: FORMATS name, or "" where no row describes the numbers (integers, foreign types).
        parts: FORMATS part name -> physical key.
        dtype: STORAGE name of the physical weight.
        why: why the numbers cannot be decoded, where they are packed in a way we do not read.
        decodes_to: cast format that the file says its numbers had before they were packed, or "".
        reshaped: shape the tensor has in the file, where a writer says it is not its own; else ().
        dialect: how the file names and packs the weight; "plain" where nothing is beside it.
        foreign: what the numbers are called, where they can be read but no row of FORMATS writes
            them; else "".
        decoder: reads such numbers.
        constants: values of parts that the file holds in a marker and not as tensors.
        called: what the file calls the numbers, "" where it does not say.
        marked: where it says so: "comfy_quant", "_quantization_metadata", "scaled_fp8" or "".
        beside: name -> key of what stands beside the weight and is no part of its numbers.
        notes: what the marker says of how the weight is to be used.
    """

    key: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, str]
    dtype: str
    why: str = ""
    decodes_to: str = ""
    reshaped: tuple[int, ...] = ()
    dialect: str = "plain"
    foreign: str = ""
    decoder: Decoder | None = field(default=None, repr=False, compare=False)
    constants: Mapping[str, float] = field(default_factory=dict)
    called: str = ""
    marked: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_as_stored(self) -> bool:
        """Whether `spec` is that of the stored tensor: a cast or an integer in its own shape."""
        return self.format in _CASTS and not (self.why or self.decoder or self.reshaped)

    @property
    def is_float(self) -> bool:
        """Whether the tensor can be read as floating point numbers."""
        return bool(self.format) or self.decoder is not None or self._is_double

    @property
    def _is_double(self) -> bool:
        return not self.why and self.dtype == "F64"

    @property
    def is_quantized(self) -> bool:
        """Whether numbers were already rounded to a low-bit format."""
        if self.format:
            return not FORMATS[self.format].is_cast
        return bool(self.why) or self.decoder is not None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def spec(self) -> TensorSpec:
        """The tensor as recognition sees it: true shape; blocks and packed weights shown as F32."""
        plain = self.dtype if not STORAGE[self.dtype].is_block and not self.is_quantized else "F32"
        return TensorSpec(self.key, plain, self.shape)


@dataclass(frozen=True, slots=True)
class LogicalSource:
    """A source with its companions folded away.

    Attributes:
        source: the container.
        tensors: source key of the weight -> logical tensor, in file order.
        consumed: physical keys that belong to a logical tensor other than as its weight.
        warnings: what looked wrong but could be read.
        set_aside: consumed keys that no output takes, and why.
    """

    source: TensorSource
    tensors: Mapping[str, LogicalTensor]
    consumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    set_aside: Mapping[str, str] = field(default_factory=dict)

    def specs(self) -> dict[str, TensorSpec]:
        """Logical specs, for recognition."""
        stored = self.source.specs
        return {
            key: stored[key] if tensor.is_as_stored else tensor.spec
            for key, tensor in self.tensors.items()
        }

    def read(self, key: str, rows: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """Decode rows of a weight to float32.

        Args:
            key: logical key.
            rows: half-open range along the first dimension; all when None.

        Returns:
            (R, K) float32 for two or more dimensions, (1, size) below.

        Raises:
            UnsupportedDtype: the numbers cannot be decoded.
        """
        tensor = self.tensors[key]
        n, k = matrix_shape(tensor.shape)
        start, stop = rows or (0, n)
        if tensor.decoder is not None:
            return tensor.decoder(self.source, (start, stop))
        if tensor.reshaped:
            return self._read_reshaped(tensor, start * k, stop * k).reshape(stop - start, k)
        if tensor.format and format_named(tensor.format).flat_block:
            offset = tensor.constants.get("nested_offset")
            state = flat_state(tensor.format, tensor.parts, n * k, offset)
            return read_flat(self.source, state, start * k, stop * k).reshape(stop - start, k)
        if tensor.format and format_named(tensor.format).is_tiled:
            return read_tiled(self.source, tensor.format, tensor.parts, tensor.shape, (start, stop))
        if tensor.format:
            parts = {
                part.name: self._part(tensor, part.name, part.per_row, (start, stop))
                for part in format_named(tensor.format).parts
            }
            name, scale = tensor.format, parts.get("scale")
            if name in _SCALED_FP8 and scale is not None and scale.ndim == 2:
                fmt = name.removesuffix("_scaled")  # some writers keep one fp8 scale per row
                rowwise: NDArray[np.float32] = backend(fmt, "decode")(
                    parts, (stop - start, k), fmt=fmt
                )
                scaled: NDArray[np.float32] = rowwise * scale
                return scaled
            out: NDArray[np.float32] = backend(format_named(name).codec, "decode")(
                parts, (stop - start, k), fmt=name
            )
            return out
        raw = self.source.read(tensor.key, (start, stop) if n > 1 else None)
        return _decode_foreign(tensor, raw, (stop - start, k))

    def _part(
        self, tensor: LogicalTensor, name: str, per_row: bool, rows: tuple[int, int]
    ) -> NDArray[Any]:
        spec = self.source.specs[tensor.parts[name]]
        n, k = matrix_shape(tensor.shape)
        start, stop = rows
        if name == "scale":  # files keep it as (), (1,), (N,) or (N, 1)
            flat = float32_of(self.source.read(spec.key), spec.dtype)
            if flat.size > 1:
                return flat[start:stop, None]
            return np.full((stop - start, 1), flat[0]) if per_row else flat.reshape(())
        if per_row and len(spec.shape) == 1 and spec.size == n:
            return float32_of(self.source.read(spec.key), spec.dtype)[start:stop]
        if spec.rows == n and n > 1:
            raw = self.source.read(spec.key, rows)
            return _view(raw, spec.dtype, (stop - start, spec.row_size))
        raw = self.source.read(spec.key)
        as_it_is = len(spec.shape) < 2 and not STORAGE[spec.dtype].is_block
        return _view(raw, spec.dtype, spec.shape if as_it_is else (n, k))

    def _read_reshaped(self, tensor: LogicalTensor, start: int, stop: int) -> NDArray[np.float32]:
        """Decode elements [start, stop) of a tensor whose rows in the file are not its own."""
        n, k = matrix_shape(tensor.reshaped)
        rows = (start // k, min(-(-stop // k), n)) if n > 1 else (0, n)
        as_stored = LogicalSource(
            self.source, {tensor.key: replace(tensor, shape=tensor.reshaped, reshaped=())}
        )
        flat = as_stored.read(tensor.key, rows).reshape(-1)
        return flat[start - rows[0] * k : stop - rows[0] * k]


def _view(raw: ByteArray, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype in _NUMPY:
        flat = raw.view(_NUMPY[dtype])
        return flat.reshape(shape)
    if STORAGE[dtype].is_block:
        rows = shape[0] if shape else 1
        return raw.reshape(rows, raw.size // max(rows, 1))
    return raw.reshape(shape)


def _decode_foreign(
    tensor: LogicalTensor, raw: ByteArray, shape: tuple[int, int]
) -> NDArray[np.float32]:
    if tensor.dtype == "F64":
        return raw.view("<f8").reshape(shape).astype(np.float32)
    raise UnsupportedDtype(f"{tensor.key}: {tensor.why or f'cannot decode {tensor.dtype}'}")
