"""What a picture's pixels owe to each weight: the power of its gradient, by row and by column.

A small change dW of a weight (N, K) moves the last latents, or the pixels, by J dW. For v drawn
from a unit normal distribution, <v, J dW> = <G, dW> with G the gradient of <v, picture>, summed
over every token of every step; so E <G, dW>^2 = |J dW|^2. Rounding errors of single weights are
taken to be independent, which leaves sum_nk E[G_nk^2] dW_nk^2, and E[G^2] (N, K) is kept as the
product of its row and its column sums, N + K numbers for a layer.

Encoders that weigh columns by importance leave errors that are not independent: they may lie along
the few directions that pictures depend on. A sketch of the gradient's rows and columns sees that:
U = G e and V = d G of all pictures, in SKETCH columns and rows, have E[U U^T] = E[G G^T] and
E[V^T V] = E[G^T G], so |U^T dW V^T|^2 is the error where both are taken whole, and its ratio to
the same sum over the diagonals alone says how much more, or less, errors add up than independent
ones would (`Power.coherence`).

G would be as large as the model, so it is never made. Probes of random signs give both sums: for
signs e (K,), E_e (G e)_n^2 = sum_k G_nk^2, and G e = sum_t g_t (x_t . e) is linear in G, so that it
adds up over tokens and steps *before* it is squared, as an error of a weight does: it is the same
at every step.

Memory: of the graph, one call of the denoiser (each is run again when its gradient is wanted) and
the autoencoder's; 48 (N + K) floats for a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from diffquant.core.errors import VerificationError
from diffquant.quant.formats import matrix_shape
from diffquant.runtime.layers import QuantConv2d, QuantLinear

__all__ = ["PROBES", "SKETCH", "GradientPower", "Power", "probe_sums", "recomputed"]

PROBES = 8  # of each kind, for one layer and picture
SKETCH = 32  # sums of probes that are kept, of each kind; a multiple of PROBES

_Layer = QuantLinear | QuantConv2d
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Power:
    """Mean squared gradient of a layer's weight (N, K), summed over columns and over rows.

    Attributes:
        rows: (N,), sum_k E[G_nk^2].
        columns: (K,), sum_n E[G_nk^2].
        row_sketch: (N, Q) float32, U of the module's head to a factor; None: errors count as
            independent.
        column_sketch: (Q, K) float32, V to a factor.
    """

    rows: _Floats
    columns: _Floats
    row_sketch: NDArray[np.float32] | None = None
    column_sketch: NDArray[np.float32] | None = None

    @property
    def total(self) -> float:
        """sum_nk E[G_nk^2], which both estimate."""
        return float(self.rows.sum() + self.columns.sum()) / 2

    def weigh(self, squares: NDArray[np.floating], rows: _Floats | None = None) -> float:
        """Predicted error of squared weight errors (R, K), of the rows that `rows` weighs (R,)."""
        total = self.total
        if not total:
            return 0.0
        weights = self.rows if rows is None else rows
        return float(weights @ (squares.astype(np.float64) @ self.columns)) / total

    def coherence(
        self, error: NDArray[np.float32], index: NDArray[np.int64] | None = None
    ) -> float:
        """How much larger an error is for not being independent: 1 where it is.

        Args:
            error: (R, K), decoded - weight.
            index: (R,) which rows these are; None: all.
        """
        if self.row_sketch is None or self.column_sketch is None:
            return 1.0
        rows = self.row_sketch if index is None else self.row_sketch[index]
        alone = _squares(rows, 1) @ error.astype(np.float64) ** 2 @ _squares(self.column_sketch, 0)
        if not alone:
            return 1.0
        together = rows.T @ (error @ self.column_sketch.T)  # (Q, Q)
        return float(_squares(together, None) / alone)


def _squares(values: NDArray[np.float32], axis: int | None) -> _Floats:
    found: _Floats = np.square(values, dtype=np.float64).sum(axis)
    return found


@dataclass(slots=True)
class _Sums:
    """Probes of one layer, what they met in this picture, and the squares of finished ones."""

    row_signs: Tensor  # (N, P)
    column_signs: Tensor  # (P, K)
    rows: Tensor  # (N, P)
    columns: Tensor  # (P, K)
    row_power: _Floats
    column_power: _Floats
    row_sketch: Tensor  # (N, Q)
    column_sketch: Tensor  # (Q, K)


@dataclass(slots=True)
class GradientPower:
    """Collects the gradients' power of a model's layers while pictures are differentiated.

    Attributes:
        layers: canonical key -> layer.
        seed: of the signs.
        pictures: how many were finished.
    """

    layers: dict[str, _Layer]
    seed: int = 0
    pictures: int = 0
    _sums: dict[str, _Sums] = field(default_factory=dict)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Collect while the context lasts; layers without a gradient are not noted."""
        handles = [
            layer.register_forward_hook(self._hook(key)) for key, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            assert isinstance(layer, QuantLinear | QuantConv2d)
            x = inputs[0].detach()
            # What no latents reach, such as modulation by time, has no graph yet: it begins here.
            y = output if output.requires_grad else output.detach().requires_grad_()

            def add(gradient: Tensor) -> None:
                sums = self._of(key, layer, x.device)
                rows, columns = probe_sums(layer, x, gradient, sums.row_signs, sums.column_signs)
                sums.rows += rows
                sums.columns += columns

            y.register_hook(add)  # type: ignore[no-untyped-call]
            return y

        return note

    def _of(self, key: str, layer: _Layer, device: torch.device) -> _Sums:
        if key not in self._sums:
            n, k = matrix_shape(layer.logical_shape)
            zeros = partial(torch.zeros, device=device)
            found = _Sums(
                row_signs=zeros((n, PROBES)),
                column_signs=zeros((PROBES, k)),
                rows=zeros((n, PROBES)),
                columns=zeros((PROBES, k)),
                row_power=np.zeros(n),
                column_power=np.zeros(k),
                row_sketch=zeros((n, SKETCH)),
                column_sketch=zeros((SKETCH, k)),
            )
            self._sums[key] = found
            self._draw(key, found)
        return self._sums[key]

    def _draw(self, key: str, sums: _Sums) -> None:
        """Fresh signs; which ones depends on seed, picture and key alone."""
        place = sorted(self.layers).index(key)
        mixed = np.random.SeedSequence([self.seed, self.pictures, place]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        for signs in (sums.row_signs, sums.column_signs):
            bits = torch.randint(0, 2, signs.shape, generator=generator)
            signs.copy_(2.0 * bits - 1)

    def finish_picture(self) -> None:
        """Square what this picture's probes met, and draw others.

        Raises:
            VerificationError: a gradient is not finite.
        """
        start = self.pictures * PROBES % SKETCH
        kept = slice(start, start + PROBES)
        self.pictures += 1
        for key, sums in self._sums.items():
            rows = sums.rows.double().square().mean(1).cpu().numpy()
            columns = sums.columns.double().square().mean(0).cpu().numpy()
            if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
                raise VerificationError(
                    f"{key}: its gradient is not finite: try --dtype float32, or --level latents"
                )
            sums.row_power += rows
            sums.column_power += columns
            sums.row_sketch[:, kept] += sums.rows  # fresh signs: pictures add up by their squares
            sums.column_sketch[kept] += sums.columns
            sums.rows.zero_()
            sums.columns.zero_()
            self._draw(key, sums)

    def power(self, key: str) -> Power:
        """Mean over the finished pictures; zeros for a layer that no picture depends on."""
        if key not in self._sums:
            n, k = matrix_shape(self.layers[key].logical_shape)
            return Power(np.zeros(n), np.zeros(k))
        sums, count = self._sums[key], max(self.pictures, 1)
        return Power(
            sums.row_power / count,
            sums.column_power / count,
            sums.row_sketch.cpu().numpy(),
            sums.column_sketch.cpu().numpy(),
        )


@torch.no_grad()
def probe_sums(
    layer: _Layer, x: Tensor, gradient: Tensor, row_signs: Tensor, column_signs: Tensor
) -> tuple[Tensor, Tensor]:
    """G e and d G of one call, where G (N, K) is the gradient of the layer's weight as a matrix.

    Args:
        layer: tells how the weight is applied.
        x: its input, (..., K) or (B, in, H, W).
        gradient: of its output, (..., N) or (B, N, H', W').
        row_signs: d, (N, P).
        column_signs: e, (P, K).

    Returns:
        (N, P) and (P, K) float32.
    """
    x, gradient = x.float(), gradient.float()
    if isinstance(layer, QuantLinear):
        tokens, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        return outputs.T @ (tokens @ column_signs.T), (outputs @ row_signs).T @ tokens
    kernel = (len(column_signs), *layer.logical_shape[1:])
    hidden = functional.conv2d(
        x, column_signs.reshape(kernel), None, layer.stride, layer.padding
    )  # (B, P, H', W')
    rows = torch.einsum("bnhw,bphw->np", gradient, hidden)
    mixed = torch.einsum("bnhw,np->bphw", gradient, row_signs)
    columns = conv2d_weight(x, kernel, mixed, layer.stride, layer.padding)  # type: ignore[no-untyped-call]
    return rows, columns.reshape(len(column_signs), -1)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Keep no graph of a model's calls: each is run again when its gradient is wanted."""
    forward = model.forward

    def call(*args: object, **named: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        names = tuple(named)

        def again(_start: Tensor, *values: object) -> object:
            cut = len(values) - len(names)
            return forward(*values[:cut], **dict(zip(names, values[cut:], strict=True)))

        # The first call's latents have no graph: `start` gives the outputs one.
        start = torch.zeros((), requires_grad=True)
        return checkpoint(again, start, *args, *named.values(), use_reentrant=True)

    model.forward = call
    try:
        yield
    finally:
        del model.forward
