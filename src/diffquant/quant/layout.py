"""What a number format is: its row, its stored parts and its requirements, as plain data.

A weight of any number of dimensions is seen as a matrix (N, K): N is the first dimension, K the
product of the others. The functions below say how parts are shaped; rows of quant/format_rows use
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffquant.core.dtypes import storage_nbytes
from diffquant.core.errors import UnsupportedShape

__all__ = [
    "Importance",
    "Part",
    "QuantFormat",
    "Requirement",
    "Shape",
    "blocks128",
    "flat_blocks",
    "halves",
    "matrix_shape",
    "padded",
    "per_row",
    "rows",
    "rows_of_blocks",
    "same",
    "scalar",
    "tiles",
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
        statistic: how the statistics of chunks are brought together: their "max", or the sum of
            sums and counts for a "mean".
        rotation: rows are rotated in groups of so many before they are rounded (ConvRot); 0: not.
        importance: whether the encoder weighs errors by an importance value per column: "unused"
            has one mode, "optional" two, "required" only the weighted one.
        encodes: False for formats that are read, never written.
        row_multiple_of: row chunks must be a multiple of this many rows, given (N, K).
        limited: whether finite weights can overflow its range: 16-bit scales, or no scale at all;
            a scale of 32 bits, or of 8 exponent bits, holds what float32 does.
        safe_amax: weights up to this magnitude cannot overflow the format; beyond it, decoding
            tells. No block format's scale exceeds the largest weight it was made for, and float16
            holds twice the default; formats without a scale have their own largest number.
        padding: rows and columns are stored rounded up to a multiple of this; 1: as they are.
        flat_block: its blocks are so many elements of the flattened weight, and run over the ends
            of rows; 0: every row has blocks of its own.
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
    limited: bool = True
    safe_amax: float = 32768.0
    padding: int = 1
    flat_block: int = 0
    statistic: Literal["max", "mean"] = "max"
    rotation: int = 0

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
    def is_tiled(self) -> bool:
        """Whether one slice of its scales belongs to several rows: they are read together."""
        return any(part.name == "block_scale" for part in self.parts)

    @property
    def is_padded(self) -> bool:
        """Whether the weight may be stored with rows and columns that are not its own."""
        return self.padding > 1


def same(shape: Shape) -> Shape:
    """As the weight."""
    return shape


def per_row(shape: Shape) -> Shape:
    """One value per row, as a column: (N, 1)."""
    return (matrix_shape(shape)[0], 1)


def scalar(_shape: Shape) -> Shape:
    """One value for the weight: ()."""
    return ()


def halves(shape: Shape) -> Shape:
    """Two elements of the flattened weight per byte."""
    return (-(-math.prod(shape) // 2),)


def flat_blocks(size: int) -> Callable[[Shape], Shape]:
    """One value per so many elements of the flattened weight."""
    return lambda shape: (-(-math.prod(shape) // size),)


def rows_of_blocks(size: int) -> Callable[[Shape], int]:
    """Rows after which a block of the flattened weight ends: size / gcd(K, size)."""
    return lambda shape: size // math.gcd(matrix_shape(shape)[1], size)


def rows(shape: Shape) -> Shape:
    """One value per row: (N,)."""
    return (matrix_shape(shape)[0],)


def blocks128(shape: Shape) -> Shape:
    """One value per square of 128 x 128."""
    n, k = matrix_shape(shape)
    return -(-n // 128), -(-k // 128)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def padded(multiple: int, *, per_byte: int = 1) -> Callable[[Shape], Shape]:
    """Both lengths rounded up to whole blocks, several numbers to a byte."""

    def shape_of(shape: Shape) -> Shape:
        n, k = matrix_shape(shape)
        return _rounded_up(n, multiple), _rounded_up(k, multiple) // per_byte

    return shape_of


def tiles(block: int) -> Callable[[Shape], Shape]:
    """A scale per block of a row, in whole tiles of 128 by 4 (codecs/swizzle.py)."""

    def shape_of(shape: Shape) -> Shape:
        n, k = matrix_shape(shape)
        return _rounded_up(n, 128), _rounded_up(-(-k // block), 4)

    return shape_of
