"""FORMATS: one frozen row per number format. Everything here is data; no array library is imported.

A row says which codec serves the format, which stored parts an encoded weight consists of (dtype
and shape of each as functions of the weight's shape, so every output size is known from specs
alone), and what it requires of a shape. A weight of any number of dimensions is seen as a matrix
(N, K): N is the first dimension, K the product of the others.

Adding a format: one codec file in `codecs/`, one row here (docs/adding.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffquant.core.dtypes import STORAGE, storage_nbytes
from diffquant.core.errors import UnknownFormat, UnsupportedShape

__all__ = [
    "FORMATS",
    "Importance",
    "Part",
    "QuantFormat",
    "Requirement",
    "format_named",
    "matrix_shape",
]

Shape = tuple[int, ...]
Importance = Literal["unused", "optional", "required"]


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a weight seen as a matrix: (N, K); vectors and scalars are one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of an encoded weight.

    Attributes:
        name: `weight` for the packed numbers, else what it holds: scale, absmax.
        dtype: STORAGE name.
        shape: logical weight shape -> stored shape.
        per_row: whether rows of the weight own whole slices of this part, so that a chunk of rows
            encodes to a contiguous slice of its bytes; False means one value for the whole tensor.
    """

    name: str
    dtype: str
    shape: Callable[[Shape], Shape]
    per_row: bool = True


@dataclass(frozen=True, slots=True)
class Requirement:
    """A precondition as data: `check` decides, `describe` explains; both read the same numbers."""

    what: str  # "last_dim" | "row" | "ndim" | "matrix": exactly so many dimensions | "rows"
    multiple: int

    def check(self, shape: Shape) -> bool:
        """Whether `shape` satisfies the requirement."""
        if self.what == "ndim":
            return len(shape) >= self.multiple
        if self.what == "matrix":
            return len(shape) == self.multiple
        if self.what == "rows":
            return matrix_shape(shape)[0] % self.multiple == 0
        value = shape[-1] if self.what == "last_dim" and shape else matrix_shape(shape)[1]
        return value > 0 and value % self.multiple == 0

    def describe(self) -> str:
        """Say what is required, as it is printed in errors and reasons."""
        if self.what == "ndim":
            return f"at least {self.multiple} dimensions"
        if self.what == "matrix":
            return f"exactly {self.multiple} dimensions"
        if self.what == "rows":
            return f"number of rows divisible by {self.multiple}"
        name = "last dimension" if self.what == "last_dim" else "row length"
        return f"{name} divisible by {self.multiple}"


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A number format.

    Attributes:
        name: lower snake, as policies name it.
        codec: module in diffquant.quant.codecs.
        bits: bits per weight including scales that grow with the weight.
        strategy: none | tensor | channel | block.
        block_size: elements that share a scale along a row (0: not blocked).
        requires: preconditions on the weight's shape.
        parts: what is stored.
        passes: 1, or 2 when a whole-tensor statistic must be known before the first row is encoded.
        importance: whether the encoder weighs errors by an importance value per column: "unused"
            has one mode, "optional" two, "required" only the weighted one.
        encodes: False for formats that are read, never written.
        row_multiple_of: row chunks must be a multiple of this many rows, given (N, K).
        gaussian_error: relative RMSE of a round trip of Gaussian weights, measured by
            benchmarks/gaussian_error.py; the tensor gate passes up to 1.5 times this value. 0 where
            nothing was measured because the format is not encoded.
        source: where the definition stands.
    """

    name: str
    codec: str
    bits: float
    strategy: str
    block_size: int
    requires: tuple[Requirement, ...]
    parts: tuple[Part, ...]
    gaussian_error: float
    source: str
    passes: int = 1
    importance: Importance = "unused"
    encodes: bool = True
    row_multiple_of: Callable[[Shape], int] = lambda _shape: 1

    def check(self, shape: Shape) -> tuple[str, ...]:
        """Return what `shape` fails, as text; empty when the format can hold it."""
        return tuple(need.describe() for need in self.requires if not need.check(shape))

    def demand(self, shape: Shape) -> None:
        """Raise unless the format can hold `shape`.

        Raises:
            UnsupportedShape: with the failed requirements.
        """
        failed = self.check(shape)
        if failed:
            raise UnsupportedShape(f"{self.name} needs {' and '.join(failed)}, got shape {shape}")

    def row_multiple(self, shape: Shape) -> int:
        """Row chunks must start at a multiple of this many rows."""
        return self.row_multiple_of(shape)

    def nbytes(self, shape: Shape) -> int:
        """Stored bytes of a weight of `shape`, all parts."""
        return sum(storage_nbytes(part.dtype, part.shape(shape)) for part in self.parts)

    @property
    def is_cast(self) -> bool:
        """Whether the format is a plain floating point dtype."""
        return self.codec == "cast"

    @property
    def padding(self) -> int:
        """Rows and columns are stored rounded up to a multiple of this; 1: as they are."""
        return _PADDING.get(self.name, 1)

    @property
    def is_tiled(self) -> bool:
        """Whether one slice of its scales belongs to several rows: they are read together."""
        return any(part.name == "block_scale" for part in self.parts)

    @property
    def is_padded(self) -> bool:
        """Whether the weight may be stored with rows and columns that are not its own."""
        return self.padding > 1

    @property
    def limited(self) -> bool:
        """Whether finite weights can overflow its range: 16-bit scales, or no scale at all."""
        return self.name not in _UNLIMITED

    @property
    def safe_amax(self) -> float:
        """Weights up to this magnitude cannot overflow the format; beyond it, decoding tells.

        No block format's scale exceeds the largest weight it was made for, and float16 holds twice
        this value; the casts have their own largest number.
        """
        return _LARGEST.get(self.name, 32768.0)


def _same(shape: Shape) -> Shape:
    return shape


def _per_row(shape: Shape) -> Shape:
    return (matrix_shape(shape)[0], 1)


def _scalar(_shape: Shape) -> Shape:
    return ()


def _halves(shape: Shape) -> Shape:
    return (-(-math.prod(shape) // 2),)


def _blocks64(shape: Shape) -> Shape:
    return (-(-math.prod(shape) // 64),)


def _rows_of_64(shape: Shape) -> int:
    """Rows after which a flat 64-block ends: 64 / gcd(K, 64)."""
    return 64 // math.gcd(matrix_shape(shape)[1], 64)


def _rows(shape: Shape) -> Shape:
    return (matrix_shape(shape)[0],)


def _blocks128_of(shape: Shape) -> Shape:
    n, k = matrix_shape(shape)
    return -(-n // 128), -(-k // 128)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(multiple: int, *, per_byte: int = 1) -> Callable[[Shape], Shape]:
    """Both lengths rounded up to whole blocks, several numbers to a byte."""

    def shape_of(shape: Shape) -> Shape:
        n, k = matrix_shape(shape)
        return _rounded_up(n, multiple), _rounded_up(k, multiple) // per_byte

    return shape_of


def _tiles(block: int) -> Callable[[Shape], Shape]:
    """A scale per block of a row, in whole tiles of 128 by 4 (codecs/swizzle.py)."""

    def shape_of(shape: Shape) -> Shape:
        n, k = matrix_shape(shape)
        return _rounded_up(n, 128), _rounded_up(-(-k // block), 4)

    return shape_of


def _cast(name: str, error: float) -> QuantFormat:
    part = Part("weight", name.upper(), _same)
    bits = STORAGE[name.upper()].block_nbytes * 8.0
    return QuantFormat(name, "cast", bits, "none", 0, (), (part,), error, "IEEE 754 / bfloat16")


def _ggml(
    name: str, error: float, *, importance: Importance = "unused", encodes: bool = True
) -> QuantFormat:
    row = STORAGE[name.upper()]
    written = f"quantize_row_{name}_ref; with importance quantize_{name}"
    return QuantFormat(
        name=name,
        codec=name,
        bits=row.block_nbytes * 8 / row.block_size,
        strategy="block",
        block_size=row.block_size,
        requires=(Requirement("ndim", 2), Requirement("last_dim", row.block_size)),
        parts=(Part("weight", row.name, _same),),
        gaussian_error=error,
        source=f"ggml ggml-quants.c {written if encodes else f'dequantize_row_{name}'}",
        importance=importance,
        encodes=encodes,
    )


def _blocks128(name: str, dtype: str, error: float) -> QuantFormat:
    return QuantFormat(
        name=name,
        codec="blocks_128",
        bits=8.0,
        strategy="block",
        block_size=128,
        requires=(Requirement("matrix", 2), Requirement("row", 128), Requirement("rows", 128)),
        parts=(Part("weight", dtype, _same), Part("block_scale", "F32", _blocks128_of)),
        gaussian_error=error,
        source="blocks of 128 x 128; silveroxides/convert_to_quant@0e2909e utils/comfy_quant.py",
        row_multiple_of=lambda _shape: 128,
    )


_ROWS = (
    _cast("f32", 0.0),
    _cast("f16", 2.07e-4),
    _cast("bf16", 1.66e-3),
    _ggml("q4_0", 0.0859, importance="optional"),
    _ggml("q4_1", 0.0782, importance="optional"),
    _ggml("q5_0", 0.0427, importance="optional"),
    _ggml("q5_1", 0.0379, importance="optional"),
    _ggml("q8_0", 0.00535),
    _ggml("q2_k", 0.297, importance="optional"),
    _ggml("q3_k", 0.151, importance="optional"),
    _ggml("q4_k", 0.0713, importance="optional"),
    _ggml("q5_k", 0.0361, importance="optional"),
    _ggml("q6_k", 0.0177, importance="optional"),
    _ggml("iq4_nl", 0.0761, importance="optional"),
    _ggml("iq4_xs", 0.0767, importance="optional"),
    _ggml("mxfp4", 0.114),
    _ggml("iq1_s", 0.0, encodes=False),
    _ggml("iq1_m", 0.0, encodes=False),
    _ggml("tq1_0", 0.0, encodes=False),
    _ggml("tq2_0", 0.0, encodes=False),
    _ggml("nvfp4", 0.0, encodes=False),
    _ggml("iq3_s", 0.166, importance="optional"),
    _ggml("iq3_xxs", 0.213, importance="optional"),
    _ggml("iq2_s", 0.265, importance="optional"),
    _ggml("iq2_xs", 0.299, importance="required"),
    _ggml("iq2_xxs", 0.344, importance="required"),
    QuantFormat(
        name="fp8_e4m3",
        codec="fp8_e4m3",
        bits=8.0,
        strategy="none",
        block_size=0,
        requires=(),
        parts=(Part("weight", "F8_E4M3", _same),),
        gaussian_error=0.0330,
        source="OCP 8-bit floating point, e4m3fn: no infinities, largest finite 448, half to even",
    ),
    QuantFormat(
        name="fp8_e4m3_scaled",
        codec="fp8_e4m3_scaled",
        bits=8.0,
        strategy="tensor",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "F8_E4M3", _same), Part("scale", "F32", _scalar, per_row=False)),
        gaussian_error=0.0265,
        source="scale = amax / 448, decoded = qdata * scale; comfy_kitchen 0.2.40 tensor/fp8.py",
        passes=2,
    ),
    QuantFormat(
        name="fp8_e5m2",
        codec="fp8_e5m2",
        bits=8.0,
        strategy="none",
        block_size=0,
        requires=(),
        parts=(Part("weight", "F8_E5M2", _same),),
        gaussian_error=0.0528,
        source="OCP 8-bit floating point, e5m2: infinities, largest finite 57344, half to even",
    ),
    QuantFormat(
        name="fp8_e5m2_scaled",
        codec="fp8_e5m2_scaled",
        bits=8.0,
        strategy="tensor",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "F8_E5M2", _same), Part("scale", "F32", _scalar, per_row=False)),
        gaussian_error=0.0528,
        source="scale = amax / 57344, decoded = qdata * scale; comfy_kitchen 0.2.40 tensor/fp8.py",
        passes=2,
    ),
    QuantFormat(
        name="int8_tensor",
        codec="int8_tensor",
        bits=8.0,
        strategy="tensor",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "I8", _same), Part("scale", "F32", _scalar, per_row=False)),
        gaussian_error=0.0109,
        source="scale = amax / 127, half to even; comfy_kitchen 0.2.40 tensor/int8.py",
        passes=2,
    ),
    QuantFormat(
        name="int8_rowwise",
        codec="int8_rowwise",
        bits=8.0,
        strategy="channel",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "I8", _same), Part("scale", "F32", _per_row)),
        gaussian_error=0.0087,
        source="scale = absmax(row) / 127, half to even; comfy_kitchen 0.2.40 tensor/int8.py",
    ),
    QuantFormat(
        name="nf4",
        codec="nf4",
        bits=4.5,
        strategy="block",
        block_size=64,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "U8", _halves), Part("absmax", "F32", _blocks64)),
        gaussian_error=0.092,
        source="bitsandbytes 0.50.2 functional.py:788-805, block 64 of the flattened weight",
        row_multiple_of=_rows_of_64,
    ),
    QuantFormat(
        name="fp8_e4m3_rowwise",
        codec="fp8_e4m3_rowwise",
        bits=8.0,
        strategy="channel",
        block_size=0,
        requires=(Requirement("ndim", 2),),
        parts=(Part("weight", "F8_E4M3", _same), Part("scale", "F32", _rows)),
        gaussian_error=0.0265,
        source="scale = amax(row) / 448; silveroxides/convert_to_quant@0e2909e",
    ),
    _blocks128("fp8_e4m3_blockwise", "F8_E4M3", 0.0265),
    _blocks128("int8_blockwise", "I8", 0.0090),
    QuantFormat(
        name="mxfp8",
        codec="mxfp8",
        bits=8.25,
        strategy="block",
        block_size=32,
        requires=(Requirement("matrix", 2),),
        parts=(Part("weight", "F8_E4M3", _padded(32)), Part("block_scale", "U8", _tiles(32))),
        gaussian_error=0.0265,
        source="comfy_kitchen 0.2.40 tensor/mxfp8.py, backends/eager/quantization.py:261-330",
        row_multiple_of=lambda _shape: 128,
    ),
    QuantFormat(
        name="nvfp4_comfy",
        codec="nvfp4_comfy",
        bits=4.5,
        strategy="block",
        block_size=16,
        requires=(Requirement("matrix", 2),),
        parts=(
            Part("weight", "U8", _padded(16, per_byte=2)),
            Part("block_scale", "F8_E4M3", _tiles(16)),
            Part("tensor_scale", "F32", _scalar, per_row=False),
        ),
        gaussian_error=0.0951,
        source="comfy_kitchen 0.2.40 tensor/nvfp4.py, backends/eager/quantization.py:119-225",
        passes=2,
        row_multiple_of=lambda _shape: 128,
    ),
)

# A scale of 32 bits, or of 8 exponent bits, holds what float32 does.
_UNLIMITED = frozenset(
    (
        "f32",
        "bf16",
        "fp8_e4m3_scaled",
        "fp8_e5m2_scaled",
        "int8_tensor",
        "int8_rowwise",
        "fp8_e4m3_rowwise",
        "fp8_e4m3_blockwise",
        "int8_blockwise",
        "nf4",
        "mxfp4",
        "mxfp8",
        "nvfp4_comfy",
    )
)

_LARGEST = {"f16": 65504.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
_PADDING = {"mxfp8": 32, "nvfp4_comfy": 16}

FORMATS: dict[str, QuantFormat] = {row.name: row for row in _ROWS}


def format_named(name: str) -> QuantFormat:
    """Look a format up.

    Raises:
        UnknownFormat: with the known names and the closest.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise UnknownFormat(name, FORMATS) from None
