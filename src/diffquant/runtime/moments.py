"""Moments: the mean input of every packed layer and its covariance, while pictures are made.

What rounding by error feedback needs (quant/rounding): x and x x^T, averaged over every token of
every call; a convolution is fed patches, zeros of the padding included, in the order of the
kernel's own memory. The same hooks as in calibrate.py, K times the work and K times the memory: a
layer of K columns keeps 8 K^2 bytes in float64, and 4 K^2 on the device until the picture is done.
Layers of more than 4096 columns keep diagonal blocks (io/inputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import VerificationError
from diffquant.io.inputs import LayerInputs, covariance_shape
from diffquant.runtime.layers import QuantConv2d, QuantLinear

__all__ = ["Moments", "finite_sums", "moments_of", "rows_seen"]

_ROWS = 1 << 14  # rows of patches at a time: unfolding multiplies a picture's size by 9


@dataclass(slots=True)
class _Layer:
    """Running sums of one layer; the recent ones stay on the device between flushes."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    recent: tuple[Tensor, Tensor] | None = None
    count: int = 0


@dataclass(slots=True)
class Moments:
    """Sums of every layer that was hooked."""

    layers: dict[str, _Layer] = field(default_factory=dict)

    @contextmanager
    def hooked(self, layers: list[tuple[str, QuantLinear | QuantConv2d]]) -> Iterator[None]:
        """Collect while the context lasts."""
        handles = [layer.register_forward_pre_hook(self._hook(key)) for key, layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, QuantLinear | QuantConv2d)
            for rows in rows_seen(layer, inputs[0]):
                sums, products = moments_of(rows)
                if key not in self.layers:
                    zeros = np.zeros(covariance_shape(len(sums)))
                    self.layers[key] = _Layer(np.zeros(len(sums)), zeros)
                one = self.layers[key]
                if one.recent is not None:
                    sums, products = one.recent[0] + sums, one.recent[1] + products
                one.recent = sums, products
                one.count += len(rows)

        return add

    def flush(self) -> None:
        """Move recent sums into the float64 totals.

        Raises:
            VerificationError: a layer's input is not finite.
        """
        for key, one in self.layers.items():
            if one.recent is None:
                continue
            for total, recent in zip((one.mean, one.covariance), one.recent, strict=True):
                total += finite_sums(key, recent)
            one.recent = None

    def inputs(self) -> dict[str, LayerInputs]:
        """Means of what was collected so far."""
        self.flush()
        return {
            key: LayerInputs(
                (one.mean / one.count).astype(np.float32),
                (one.covariance / one.count).astype(np.float32),
                one.count,
            )
            for key, one in self.layers.items()
            if one.count
        }


def rows_seen(layer: QuantLinear | QuantConv2d, x: Tensor) -> Iterator[Tensor]:
    """Cut a layer's input into rows of its weight's columns: (R, K) float32, some at a time."""
    values = x.detach().float()
    if isinstance(layer, QuantLinear):
        yield from _cut(values.reshape(-1, values.shape[-1]))
        return
    kernel = layer.logical_shape[-1]
    for index in range(len(values)):
        one = values[index : index + 1]
        patches = functional.unfold(one, kernel, padding=layer.padding, stride=layer.stride)
        yield from _cut(patches[0].T)  # (patches, K)


def _cut(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of rows and of their outer products, in the shape in which they are kept."""
    shape = covariance_shape(rows.shape[1])
    if len(shape) == 2:
        return rows.sum(0), rows.T @ rows
    blocks = rows.reshape(len(rows), shape[0], shape[1]).permute(1, 0, 2)  # (B, R, b)
    return rows.sum(0), blocks.transpose(1, 2) @ blocks


def finite_sums(key: str, recent: Tensor) -> NDArray[np.float64]:
    """A layer's recent sums, to be added to its totals.

    Raises:
        VerificationError: the layer's input is not finite.
    """
    found = recent.cpu().numpy().astype(np.float64)
    if not np.isfinite(found).all():
        raise VerificationError(
            f"{key}: its input is not finite, or its squares overflow: try --dtype float32"
        )
    return found
