"""Layers whose weight stays packed: it is decoded for one call and forgotten.

A `PackedWeight` is a logical weight made of one or more packed segments stacked along the first
dimension. One segment is the rule; several serve layouts in which a source stores q, k and v apart
and the model wants them fused (block formats cannot be concatenated across formats, so they are
not).

Adapters (LoRA and kin) are a side branch, never merged: `y += scale * up(down(x))`. So a weight of
four bits keeps what a LoRA says, which requantizing the sum would round away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import PlanMismatch, UnknownFormat, UnsupportedDtype, UnsupportedShape
from diffquant.runtime.kernels import KERNELS, ROWWISE, decode
from diffquant.runtime.kernels.rows import QuantizedRows, RowKind

if TYPE_CHECKING:
    from diffquant.runtime.stored import StoredWeight

__all__ = [
    "Activations",
    "Home",
    "LowRank",
    "PackedLayer",
    "PackedWeight",
    "Product",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "Segment",
]

Activations: TypeAlias = "Tensor | QuantizedRows"

_PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a weight in one number format.

    Attributes:
        format: name of a number format, a key of KERNELS.
        shape: logical shape of these rows.
        parts: stored tensors by part name, as kernels/reference.py lists them.
    """

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse a format nobody can decode, before anything runs."""
        if self.format not in KERNELS:
            raise UnknownFormat(self.format, KERNELS)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode to `shape`, in float32 and then cast, by the best routine for the device."""
        return decode(self.format, self.parts, self.shape, dtype)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A logical weight: segments stacked along the first dimension.

    Attributes:
        segments: at least one; all agree on every dimension but the first.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        """Check that the segments can be stacked."""
        tails = {segment.shape[1:] for segment in self.segments}
        if len(tails) != 1:
            shapes = [segment.shape for segment in self.segments]
            raise UnsupportedShape(f"segments cannot be stacked along rows: shapes {shapes}")

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Wrap a float32, float16 or bfloat16 tensor without copying it.

        Raises:
            UnsupportedDtype: any other dtype.
        """
        if tensor.dtype not in _PLAIN:
            known = ", ".join(_PLAIN.values())
            raise UnsupportedDtype(f"a plain weight is one of {known}, found {tensor.dtype}")
        segment = Segment(_PLAIN[tensor.dtype], tuple(tensor.shape), {"weight": tensor.detach()})
        return cls((segment,))

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the stack."""
        first = self.segments[0].shape
        if len(self.segments) == 1:
            return first
        return (sum(segment.shape[0] for segment in self.segments), *first[1:])

    @property
    def nbytes(self) -> int:
        """Bytes held by all stored parts."""
        return sum(part.nbytes for segment in self.segments for part in segment.parts.values())

    @property
    def formats(self) -> tuple[str, ...]:
        """Number format of each segment, in order."""
        return tuple(segment.format for segment in self.segments)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.segments[0].parts["weight"].device

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode the whole weight to `shape`; a plain weight of that dtype is returned uncopied."""
        rows = [segment.dequantize(dtype) for segment in self.segments]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def take_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode only the rows named by `index` (n,) integer: (n, K...).

        Formats that are not stored by rows are decoded whole, then indexed.
        """
        segment = self.segments[0]
        if len(self.segments) > 1 or segment.format not in ROWWISE:
            return self.dequantize(dtype)[index]
        rows = segment.shape[0]
        parts = {
            name: part[index] if part.ndim and part.shape[0] == rows else part
            for name, part in segment.parts.items()
        }
        return KERNELS[segment.format](parts, (len(index), *segment.shape[1:]), dtype)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Move every part; dtypes never change."""
        return self._each(lambda part: part.to(device))

    def copy(self) -> PackedWeight:
        """The same weight in memory of its own."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        return PackedWeight(
            tuple(
                Segment(s.format, s.shape, {k: change(v) for k, v in s.parts.items()})
                for s in self.segments
            )
        )


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter beside a layer: `scale * up(down(x))`, added to the layer's output.

    Attributes:
        down: (r, K) for a linear layer, (r, in, kh, kw) for a convolution.
        up: (n, r), or (n, r, 1, 1); n is the number of output rows it reaches.
        scale: weight times alpha / r.
        rows: first and last + 1 output row it reaches; None: all. Lets an adapter of q alone sit
            beside a fused qkv.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> LowRank:
        """Move both factors."""
        return LowRank(self.down.to(device), self.up.to(device), self.scale, self.rows)


class Home(Protocol):
    """Where weights live that are not on the device all the time; see runtime/memory.

    Attributes:
        device: what is computed on.
    """

    device: torch.device

    def weight(self, layer: PackedLayer) -> PackedWeight:
        """The layer's weight on the device, good until another layer asks for its own."""
        ...

    def rows(self, layer: PackedLayer, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of a table named by `index` (n,), decoded, on the device: (n, width)."""
        ...


class Product(Protocol):
    """How a linear layer multiplies: in 8 bits (low_bit.py), few rows by a kernel (few_rows.py)."""

    @property
    def key(self) -> Hashable:
        """What a compiled graph of the layer depends on."""
        ...

    def linear(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in the dtype of `x`, bias included."""
        ...

    def takes(self, layer: QuantLinear, x: Tensor) -> RowKind | None:
        """See QuantLinear.takes."""
        ...

    def of_rows(self, layer: QuantLinear, x: QuantizedRows) -> Tensor:
        """As `linear`, of rows of the kind that `takes` named."""
        ...


class PackedLayer(nn.Module):
    """What the three layers share: a packed weight, an optional bias, a list of adapters.

    The weight is no Parameter: `.to(dtype)` and `.half()` must not touch packed bytes, while moves
    to another device must take them along; `_apply` sees to both.
    """

    def __init__(self, shape: tuple[int, ...], *, bias: bool) -> None:
        """Declare the logical shape of the weight; the weight itself comes with `bind`."""
        super().__init__()
        self.logical_shape = shape
        self.packed: PackedWeight | None = None
        self.stored: StoredWeight | None = None
        self.home: Home | None = None
        self.on_replace: Callable[[PackedLayer, PackedWeight], None] | None = None
        self.adapters: list[LowRank] = []
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False)

    def bind(self, weight: PackedWeight) -> None:
        """Take `weight`; a 1x1 convolution kernel is accepted where a matrix is declared.

        Raises:
            UnsupportedShape: the weight's shape is not the declared one.
        """
        wanted, found = self.logical_shape, weight.shape
        if found != wanted and (
            found[: len(wanted)] != wanted or math.prod(found[len(wanted) :]) != 1
        ):
            raise UnsupportedShape(f"expected a weight of shape {wanted}, found {found}")
        self.packed = weight

    def bind_stored(self, stored: StoredWeight) -> None:
        """Take a weight that stays in its file until a home brings it; see `bind`."""
        self.bind(stored.outline)
        self.stored = stored

    def replace(self, weight: PackedWeight) -> None:
        """Take another weight of the same shape in place of the one that is bound and here.

        Whoever placed that one hears of it (`on_replace`) and lets go of it.
        """
        self.packed = weight
        if self.on_replace is not None:
            self.on_replace(self, weight)

    def outline(self) -> PackedWeight:
        """The weight for what is not in its numbers: its shape, formats, bytes."""
        if self.packed is None:
            raise PlanMismatch("a layer was called before its weight was bound")
        return self.packed

    @property
    def device(self) -> torch.device:
        """What the layer computes on."""
        return self.outline().device if self.home is None else self.home.device

    def bound(self) -> PackedWeight:
        """The packed weight; calling a layer before `bind` is a bug of ours."""
        return self.outline() if self.home is None else self.home.weight(self)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight for one call: `logical_shape`."""
        return self.bound().dequantize(dtype).reshape(self.logical_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.packed is not None and self.packed.device.type != "meta":
            probe = torch.empty(0, dtype=torch.uint8, device=self.packed.device)
            device = fn(probe).device
            if device != probe.device:
                self.packed = self.packed.to(device)
                self.adapters = [adapter.to(device) for adapter in self.adapters]
        return self


def _add(y: Tensor, delta: Tensor, rows: tuple[int, int] | None, dim: int) -> Tensor:
    if rows is None:
        return y + delta
    y.narrow(dim, rows[0], rows[1] - rows[0]).add_(delta)
    return y


class QuantLinear(PackedLayer):
    """`y = x W^T + b`, with W (out_features, in_features) packed."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        """Declare the layer; see PackedLayer."""
        super().__init__((out_features, in_features), bias=bias)
        self.product: Product | None = None

    def takes(self, x: Tensor) -> RowKind | None:
        """What the layer would quantize rows like `x`'s to, where they may come to it so.

        `x` has as many rows, and the dtype and the device; its width may be another.
        """
        if self.product is None or self.adapters:  # adapters are given what is not quantized
            return None
        return self.product.takes(self, x)

    def forward(self, x: Activations) -> Tensor:
        """Map (..., in_features) to (..., out_features) in the dtype of `x`."""
        if isinstance(x, QuantizedRows):
            assert self.product is not None, "rows that nobody asked for"
            return self.product.of_rows(self, x)
        if self.product is None:
            y = functional.linear(x, self.weight(x.dtype), self.bias)
        else:
            y = self.product.linear(self, x)
        for adapter in self.adapters:
            down, up = adapter.down.flatten(1).to(x.dtype), adapter.up.flatten(1).to(x.dtype)
            delta = functional.linear(functional.linear(x, down), up) * adapter.scale
            y = _add(y, delta, adapter.rows, -1)
        return y


class QuantConv2d(PackedLayer):
    """2-D convolution, its kernel (out, in, k, k) packed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        """Declare the layer; all convolutions of these models are square."""
        super().__init__((out_channels, in_channels, kernel, kernel), bias=bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H', W') in the dtype of `x`."""
        y = functional.conv2d(x, self.weight(x.dtype), self.bias, self.stride, self.padding)
        for adapter in self.adapters:
            down, up = adapter.down.to(x.dtype), adapter.up.to(x.dtype)
            hidden = functional.conv2d(x, down, None, self.stride, self.padding)
            delta = functional.conv2d(hidden, up[:, :, None, None] if up.ndim == 2 else up)
            y = _add(y, delta * adapter.scale, adapter.rows, 1)
        return y


class QuantEmbedding(PackedLayer):
    """A table (rows, width); only the rows asked for are decoded."""

    def __init__(self, rows: int, width: int) -> None:
        """Declare the table."""
        super().__init__((rows, width), bias=False)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up integer `ids` (...): (..., width) in `dtype`."""
        flat = ids.reshape(-1)
        if self.home is not None:
            rows = self.home.rows(self, flat, dtype)
        else:
            rows = self.bound().take_rows(flat, dtype)
        return rows.reshape(*ids.shape, self.logical_shape[1])
