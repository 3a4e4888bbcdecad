"""Linear layers called with few rows: one kernel that decodes on the way, where it serves a weight.

Modulations, embedders of timesteps and other layers on one row per picture hold a quarter of
Flux.1's weights and a third of Qwen-Image's. Decoded first, such a weight is written and read again
for one row: 1.7 times a bfloat16 product on an H100, where the kernel takes 0.6 to 0.9
(docs/lab-log.md, 2026-11-28). Its numbers are those of decoding to the dtype of the activations and
multiplying, but for the order of float32 sums, which no library of products promises either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.runtime.compute import Card
from diffquant.runtime.kernels import products
from diffquant.runtime.kernels.rotated import rotated_by_matrix
from diffquant.runtime.kernels.rows import QuantizedRows, RowKind
from diffquant.runtime.layers import QuantLinear
from diffquant.runtime.packed_rows import unrotated

__all__ = ["FEW", "ExactLayer", "FewRows", "exactly", "is_few", "serve_few_rows", "settle"]

FEW = 64  # rows that are few, at most: products in 8 bits do not pay for them either


def is_few(x: Tensor) -> bool:
    """Whether activations (..., K) have so few rows."""
    return x.numel() <= FEW * x.shape[-1]


class FewRows:
    """The kernel for one layer.

    Attributes:
        most: rows that it serves; 0: none; None: not asked yet.
    """

    def __init__(self, *, rotated: bool) -> None:
        """`rotated`: whether rows may be rotated instead of the weight, which rounds otherwise."""
        self.most: int | None = None
        self._rotated = rotated

    def ask(self, layer: QuantLinear) -> None:
        """Find out whether the kernel serves the layer's weight, which is on the device."""
        weight = layer.bound()
        fmt, parts, rotation = unrotated(weight.segments[0])
        may = len(weight.segments) == 1 and (self._rotated or not rotation)
        self.most = products.few_rows_serve(fmt, parts, layer.logical_shape) if may else 0

    def of(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """Map (..., K) with at most FEW rows to (..., N)."""
        if self.most is None and not torch.compiler.is_compiling():
            self.ask(layer)
        weight, count = layer.bound(), x.numel() // x.shape[-1]
        if not 0 < count <= (self.most or 0) or len(weight.segments) > 1:
            return exactly(layer, x)
        fmt, parts, rotation = unrotated(weight.segments[0])
        rows = x.reshape(count, -1)
        if rotation:
            rows = rotated_by_matrix(rows, rotation)
        y = products.few_rows(rows, fmt, parts, layer.logical_shape, layer.bias)
        return y.reshape(*x.shape[:-1], -1)


class ExactLayer:
    """How a layer multiplies that does so exactly: few rows by the kernel; see layers.Product."""

    def __init__(self) -> None:
        """Its first call of few rows asks whether the kernel serves it."""
        self._few = FewRows(rotated=False)

    @property
    def key(self) -> int | None:
        """See layers.Product."""
        return self._few.most

    def ask(self, layer: QuantLinear) -> None:
        """See FewRows; before a layer is compiled, which asks nothing."""
        if self._few.most is None and layer.home is None and layer.device.type != "meta":
            self._few.ask(layer)

    def linear(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """See layers.Product."""
        if is_few(x):
            return self._few.of(layer, x)
        return exactly(layer, x)

    def takes(self, _layer: QuantLinear, _x: Tensor) -> RowKind | None:
        """See layers.Product: nothing is quantized."""
        return None

    def of_rows(self, _layer: QuantLinear, _x: QuantizedRows) -> Tensor:
        """See layers.Product; `takes` asks for none."""
        raise AssertionError("rows that nobody asked for")


def exactly(layer: QuantLinear, x: Tensor) -> Tensor:
    """Decode the weight, and multiply: (..., K) to (..., N)."""
    return functional.linear(x, layer.weight(x.dtype), layer.bias)


def serve_few_rows(denoiser: nn.Module, card: Card) -> None:
    """Let every linear layer that multiplies exactly do so by the kernel, where a card runs it."""
    if card.type != "cuda" or card.without_triton:
        return
    for layer in denoiser.modules():
        if isinstance(layer, QuantLinear):
            layer.product = ExactLayer()


def settle(denoiser: nn.Module) -> None:
    """Ask for all exact layers whose weights are here: compiled calls do not."""
    for layer in denoiser.modules():
        if isinstance(layer, QuantLinear) and isinstance(layer.product, ExactLayer):
            layer.product.ask(layer)
