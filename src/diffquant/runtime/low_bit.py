"""Layers that multiply in 8 bits: which do, what their weights become, what error each makes.

A layer of a denoiser's blocks is chosen by its place and its weight; modulations, embedders and the
last layer are not. Its first call in a run decides: it is computed exactly and in 8 bits, and where
the outputs differ by more than ERROR_BOUND (relative, Frobenius), the layer stays exact. So the
first step takes longer, and every layer of it waits for the card once.

Weights stored in the kind that is multiplied are used as they are. Others are quantized once more,
to 8 bits with a scale per row, on that first call, and **replace** the packed weight on the device:
8 bits per weight, and what float32 (a run that overflowed) or few rows decode from then on. A
weight that is streamed comes anew for every call and is not quantized again: it stays exact.

Few rows (1 to 64) never gain from products in 8 bits: those layers' calls are exact, by one kernel
that decodes on the way where it serves the format (few_rows.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffquant.runtime.compiling import regions
from diffquant.runtime.compute import Card, Engine, Mode, engines_for
from diffquant.runtime.few_rows import FewRows, exactly, is_few, serve_few_rows
from diffquant.runtime.kernels.rows import QuantizedRows, RowKind
from diffquant.runtime.layers import PackedWeight, QuantLinear
from diffquant.runtime.packed_rows import is_stored, multiply, requantized, rotation_of

__all__ = ["ERROR_BOUND", "LowBit", "LowBitLayer", "apply", "assign", "pending"]

# Gaussian rows are far below it in both kinds (docs/gpu.md); q4_k is 0.075 from its source.
ERROR_BOUND = 0.08
_MULTIPLE = 16  # of both dimensions of a weight
# Layers on one row per picture, where errors reach every token; by names in runtime/models.
_COMMANDS = re.compile(r"(^|[._])(mod|modulation|adaLN\w*|emb_layers|norm_out)([._]|$)")


_PLAIN = {"f32", "f16", "bf16"}
State = Literal["pending", "on", "off"]


class LowBitLayer:
    """How one layer multiplies; see layers.Product.

    Attributes:
        kind: of its products; "": exact, and only few rows are served.
        state: pending until its first call of many rows; then on, or off.
        error: relative, of that call's output; None before.
        reason: why it is as it is, for people.
        requantized: whether its weight was quantized once more.
    """

    def __init__(self, kind: str, reason: str, dtypes: tuple[torch.dtype, ...] = ()) -> None:
        """Take a kind, or none."""
        self.kind, self.reason, self._dtypes = kind, reason, dtypes
        self.state: State = "pending" if kind else "off"
        self.error: float | None = None
        self.requantized = False
        self._few = FewRows(rotated=True)

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What a compiled graph depends on."""
        return self.kind, self.state, self._few.most

    def linear(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        if is_few(x):
            return self._few.of(layer, x)
        if self.state == "off" or x.dtype not in self._dtypes:
            return exactly(layer, x)
        weight = layer.bound()
        if self.state == "pending":
            return self._first(layer, weight, x)
        if not is_stored(weight, self.kind):  # it left the device and came again
            if layer.home is not None:
                self._stream()
                return exactly(layer, x)
            weight = requantized(weight, self.kind)
            layer.replace(weight)
        return multiply(x, weight, layer.bias, self.kind)

    def takes(self, layer: QuantLinear, x: Tensor) -> RowKind | None:
        """See layers.QuantLinear.takes: nothing before the layer is on, and none of few rows."""
        if self.state != "on" or x.dtype not in self._dtypes or is_few(x):
            return None
        weight = layer.outline()
        if layer.home is not None or not is_stored(weight, self.kind):
            return None
        rotation = rotation_of(weight)
        return None if rotation is None else RowKind(self.kind, rotation)

    def of_rows(self, layer: QuantLinear, x: QuantizedRows) -> Tensor:
        """As `linear`, of rows of the kind that `takes` named."""
        return multiply(x, layer.bound(), layer.bias, self.kind)

    def _first(self, layer: QuantLinear, weight: PackedWeight, x: Tensor) -> Tensor:
        """Compute both ways, compare, and decide."""
        exact = exactly(layer, x)
        again = not is_stored(weight, self.kind)
        if again and layer.home is not None:
            self._stream()
            return exact
        if again:
            weight = requantized(weight, self.kind)
        y = multiply(x, weight, layer.bias, self.kind)
        self.error = _relative(y, exact)
        if not self.error <= ERROR_BOUND:  # NaN too
            self.state = "off"
            self.reason = f"its output is off by more than {ERROR_BOUND:g} in {self.kind}"
            return exact
        if again:
            layer.replace(weight)
        self.state, self.requantized = "on", again
        return y

    def _stream(self) -> None:
        self.state, self.requantized = "off", False
        self.reason = "its weight is streamed and would have to be quantized at every call"


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm; 0 where there is no difference."""
    gap = torch.linalg.vector_norm(found.float() - wanted.float())
    size = torch.linalg.vector_norm(wanted.float())
    return float(torch.where(gap == 0, gap, gap / size))


@dataclass(frozen=True, slots=True)
class LowBit:
    """What became of a denoiser.

    Attributes:
        mode: what was asked for.
        layers: name -> how it multiplies.
        engines: kind -> what multiplies it.
        nbytes: what weights take more on the device once they are quantized again, at most.
        warnings: sentences for people.
    """

    mode: Mode
    layers: Mapping[str, LowBitLayer]
    engines: Mapping[str, str]
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def said(self) -> tuple[str, ...]:
        """How many layers are computed in what, and why; the largest groups first."""
        groups: dict[str, list[LowBitLayer]] = {}
        for one in self.layers.values():
            kind = one.kind if one.state == "on" else "exact"
            kind = f"{one.kind}, not called yet" if one.state == "pending" else kind
            groups.setdefault(f"{kind} ({one.reason})", []).append(one)
        rows = []
        for text, members in sorted(groups.items(), key=lambda pair: -len(pair[1])):
            errors = [one.error for one in members if one.error is not None]
            worst = f", output error up to {max(errors):.2g}" if errors else ""
            again = sum(one.requantized for one in members)
            also = f", {again} weights quantized again to 8 bits" if again else ""
            rows.append(f"{len(members)} layers {text}{worst}{also}")
        return tuple(rows)


def apply(denoiser: nn.Module, mode: Mode, card: Card) -> LowBit:
    """Choose how every linear layer of a denoiser multiplies; by `exact` few rows alone gain.

    Args:
        denoiser: its layers' weights are bound, or known in outline.
        mode: what is asked for.
        card: what it runs on.

    Returns:
        What was chosen; it fills up as layers are called.

    Raises:
        UnknownFormat: no such mode.
    """
    engines, refused = engines_for(mode, card)
    if not engines:
        serve_few_rows(denoiser, card)
        told = (
            ()
            if mode in ("auto", "exact")
            else (f"--compute {mode}: computed exactly, {refused[0]}",)
        )
        return LowBit(mode, {}, {}, 0, told)
    return assign(denoiser, mode, engines)


def assign(denoiser: nn.Module, mode: Mode, engines: Mapping[str, Engine]) -> LowBit:
    """As `apply`, with what multiplies each kind given."""
    blocks = {id(one) for block in regions(denoiser) for one in block.modules()}
    linear = {n: m for n, m in denoiser.named_modules() if isinstance(m, QuantLinear)}
    packed = any(not set(one.outline().formats) <= _PLAIN for one in linear.values())
    chosen, extra = {}, 0
    for name, layer in linear.items():
        inside = id(layer) in blocks
        kind, reason = _choice(name, layer, mode, engines, inside=inside, packed=packed)
        dtypes = engines[kind].dtypes if kind else ()
        layer.product = chosen[name] = LowBitLayer(kind, reason, dtypes)
        if kind and not is_stored(layer.outline(), kind):
            rows, columns = layer.logical_shape
            extra += max(0, rows * (columns + 4) - layer.outline().nbytes)
    return LowBit(mode, chosen, {kind: one.name for kind, one in engines.items()}, extra)


def _choice(
    name: str,
    layer: QuantLinear,
    mode: Mode,
    engines: Mapping[str, Engine],
    *,
    inside: bool,
    packed: bool,
) -> tuple[str, str]:
    """The kind a layer multiplies in, "" for exactly, and why."""
    weight = layer.outline()
    if not inside:
        return "", "outside of the blocks: embedders and the last layer"
    if _COMMANDS.search(name):
        return "", "modulation: one row per picture"
    heights = [one.shape[0] for one in weight.segments]
    if any(size % _MULTIPLE for size in (*heights, layer.logical_shape[1])):
        return "", f"its size is no multiple of {_MULTIPLE}"
    for kind, engine in engines.items():
        if is_stored(weight, kind):
            return kind, f"{engine.name}: {engine.reason}"
    if mode == "auto":
        return "", "its weight is stored in no kind that the card multiplies"
    if packed and set(weight.formats) <= _PLAIN:
        return "", "the file keeps it in high precision"
    return mode, f"{engines[mode].name}: {engines[mode].reason}"


def pending(denoiser: nn.Module) -> bool:
    """Whether a layer has yet to be called before it is known how it multiplies."""
    return any(
        isinstance(one, QuantLinear)
        and isinstance(one.product, LowBitLayer)
        and one.product.state == "pending"
        for one in denoiser.modules()
    )
