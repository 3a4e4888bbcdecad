"""calibrate(): measure an importance matrix while the bundled runtime makes pictures.

Each packed layer of the denoiser gets a hook, for the time of the run only, that adds up the
squares of its input, one sum per column of the layer's weight as a matrix (N, K):

- a linear layer: over every token of every call, K = in_features;
- a convolution: over every patch its kernel sees, zeros of the padding included, K = in * k * k in
  the order of the kernel's own memory. 1x1 convolutions are linear layers per pixel.

Layers whose weight was fused of several source tensors have one entry: the pieces share the input.
With classifier-free guidance both halves of the batch count, since both decide the picture.

A chunk, the unit in which imatrix files count, is one call of the denoiser; its size is the rows of
the layer that sees most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.io.inputs import LayerInputs
from diffquant.runtime.calibration_run import CalibrationRun
from diffquant.runtime.layers import QuantConv2d, QuantLinear
from diffquant.runtime.moments import Moments, finite_sums
from diffquant.runtime.opening import PartOrigin

__all__ = ["Calibration", "Collector", "calibrate", "column_squares", "layers_of"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run measured.

    Attributes:
        matrix: one entry per packed layer of the denoiser, under canonical keys.
        pictures: how many were made.
        calls: of the denoiser.
        layers: packed layers of the denoiser; those without an entry were never called.
        origins: where the parts came from.
        warnings: as the runtime has them.
        inputs: mean and covariance of each layer's input by canonical key; empty unless asked for.
        architecture: slug of the model.
    """

    matrix: ImportanceMatrix
    pictures: int
    calls: int
    layers: int
    origins: tuple[PartOrigin, ...]
    warnings: tuple[str, ...]
    inputs: Mapping[str, LayerInputs]
    architecture: str


def column_squares(layer: QuantLinear | QuantConv2d, x: Tensor) -> tuple[Tensor, int]:
    """Sum the squares that meet each column of a layer's weight.

    Args:
        layer: tells how the weight is applied.
        x: the layer's input: (..., in_features), or (B, in, H, W).

    Returns:
        (K,) float32 on the device of `x`, and the number of rows summed.
    """
    squares = x.detach().float().square()
    if isinstance(layer, QuantLinear):
        rows = squares.reshape(-1, squares.shape[-1])
        return rows.sum(0), len(rows)
    kernel, stride = layer.logical_shape[-1], layer.stride
    padded = functional.pad(squares, (layer.padding,) * 4)
    height, width = ((n - kernel) // stride + 1 for n in padded.shape[2:])
    sums = [
        padded[:, :, i : i + height * stride : stride, j : j + width * stride : stride][
            :, :, :height, :width
        ].sum((0, 2, 3))
        for i in range(kernel)
        for j in range(kernel)
    ]
    return torch.stack(sums, 1).reshape(-1), len(x) * height * width


@dataclass(slots=True)
class _Sums:
    """Running totals of one layer; `recent` stays on the device between flushes."""

    total: NDArray[np.float64]
    recent: Tensor | None = None
    count: int = 0
    largest: int = 0


@dataclass(slots=True)
class Collector:
    """Totals of every packed layer of a model.

    Attributes:
        calls: of the model itself, while hooked.
    """

    sums: dict[str, _Sums] = field(default_factory=dict)
    calls: int = 0

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Collect while the context lasts; the model is left as it was found."""

        def count(_module: nn.Module, _inputs: object) -> None:
            self.calls += 1

        handles = [model.register_forward_pre_hook(count)]
        handles += [layer.register_forward_pre_hook(self._hook(k)) for k, layer in layers_of(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, QuantLinear | QuantConv2d)
            sums, rows = column_squares(layer, inputs[0])
            entry = self.sums.setdefault(key, _Sums(np.zeros(len(sums))))
            entry.recent = sums if entry.recent is None else entry.recent + sums
            entry.count += rows
            entry.largest = max(entry.largest, rows)

        return add

    def flush(self) -> None:
        """Move recent sums into the float64 totals.

        Raises:
            VerificationError: a layer's input is not finite.
        """
        for key, entry in self.sums.items():
            if entry.recent is None:
                continue
            entry.total += finite_sums(key, entry.recent)
            entry.recent = None

    def matrix(self, datasets: tuple[str, ...] = ()) -> ImportanceMatrix:
        """What was collected so far."""
        self.flush()
        entries = {
            key: Entry(one.total.reshape(1, -1), np.array([one.count], np.int64))
            for key, one in self.sums.items()
        }
        chunk_size = max((one.largest for one in self.sums.values()), default=1)
        return ImportanceMatrix(entries, datasets, self.calls, chunk_size)


def layers_of(model: nn.Module) -> list[tuple[str, QuantLinear | QuantConv2d]]:
    """Packed layers by canonical key."""
    return [
        (f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantConv2d)
    ]


def calibrate(
    model: Path,
    prompts: Sequence[str],
    *,
    dataset: str = "",
    moments: bool = False,
    progress: Progress = NO_PROGRESS,
    **run: Any,  # noqa: ANN401 (what CalibrationRun takes)
) -> Calibration:
    """Make one picture per prompt and measure what drives each layer of the denoiser.

    Args:
        model: what `generate` takes; its own weights decide the activations, so use the
            unquantized source.
        prompts: one per picture.
        dataset: name of the prompts, kept in the file.
        moments: whether to measure means and covariances too (runtime/moments.py).
        progress: told about sampler steps.
        run: fields of CalibrationRun: how the pictures are made.

    Raises:
        DiffquantError: a part, a size or a value that does not fit; or inputs that are not finite.
    """
    if not prompts:
        raise UsageError("no prompts to calibrate with")
    how = CalibrationRun(**run)
    opened = how.open(model)
    denoiser = opened.pipeline.parts.denoiser
    collector, sums = Collector(), Moments()
    hooked = sums.hooked(layers_of(denoiser)) if moments else nullcontext()
    warnings = list(opened.warnings)
    progress.start("calibrate", how.steps * len(prompts), "step")
    try:
        with collector.hooked(denoiser), hooked:
            for request in how.requests(prompts, opened):
                made = opened.pipeline.run(
                    request, on_step=lambda _done, _total: progress.advance(1)
                )
                collector.flush()
                sums.flush()
                warnings += [f"the prompt was cut: {text!r}" for text in made.truncated]
    finally:
        progress.stop()
    return Calibration(
        matrix=collector.matrix((dataset,) if dataset else ()),
        pictures=len(prompts),
        calls=collector.calls,
        layers=len(layers_of(denoiser)),
        origins=opened.origins,
        warnings=tuple(dict.fromkeys(warnings)),
        inputs=sums.inputs(),
        architecture=opened.architecture,
    )
