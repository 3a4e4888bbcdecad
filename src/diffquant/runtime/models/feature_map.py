"""Feature maps computed in horizontal strips: the same numbers, in less memory.

A convolution's row needs a row above and one below. So a strip of a layer's output is made of the
same rows of its input and a halo around them, as the layer itself would make them: what it makes
at cut edges is wrong and thrown away, at the map's own edges its padding is right. Group norm needs
a mean and a variance of the whole map; they are gathered as the map is written, strip by strip. So
nothing is blended and no seam can show: only sums are rounded in another order.

A map lies on the device, or (`host`) in host memory, from where strips travel to the device and
back. Sources: variances of parts combine as in Chan, Golub, LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances" (1979), equation 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.convert.footprint.reach import CONV, DOUBLE, HALVE, POINT, Reach, cuts, rows_for

__all__ = ["CONV", "DOUBLE", "HALVE", "POINT", "RELU", "SILU", "FeatureMap", "Reach", "StripPlan"]

Layer: TypeAlias = Callable[..., Tensor]

SILU: Callable[[Tensor], Tensor] = partial(functional.silu, inplace=True)
RELU: Callable[[Tensor], Tensor] = partial(functional.relu, inplace=True)

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StripPlan:
    """How all maps of one run are cut and where they lie.

    Attributes:
        device: computes.
        host: whether maps lie in host memory instead of on the device.
        rows: of a strip, in rows of the latents; 0: as many as keep a strip small.
        latent_rows: height of the latents.
    """

    device: torch.device
    host: bool
    rows: int
    latent_rows: int

    @property
    def store(self) -> torch.device:
        """Where maps lie."""
        return _HOST if self.host else self.device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A map to be written.

        On CUDA half precision lies channels last: cuDNN would lay out every strip anew otherwise,
        and a strip of one picture is then one piece of memory, which crosses the bus at once.
        """
        last = self.device.type == "cuda" and dtype.itemsize == 2
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=self.store, memory_format=layout)


@dataclass(slots=True)
class _Statistics:
    """Mean and sum of squared differences from it, of each strip and channel, in float32."""

    counts: list[int] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)  # (B, C) each
    squares: list[Tensor] = field(default_factory=list)

    def add(self, strip: Tensor) -> None:
        mean = strip.mean((2, 3), dtype=torch.float32, keepdim=True)
        self.counts.append(strip.shape[2] * strip.shape[3])
        self.means.append(mean[:, :, 0, 0])
        self.squares.append(torch.linalg.vector_norm(strip - mean, dim=(2, 3)).square())

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """What the norm multiplies each channel by and then adds: float32 (B, C, 1, 1) each."""
        grouped = (*self.means[0].shape[:-1], norm.num_groups, -1)
        means = torch.stack(self.means).view(len(self.counts), *grouped)  # (S, B, G, C / G)
        squares = torch.stack(self.squares).view(len(self.counts), *grouped)
        total = sum(self.counts)
        share = torch.tensor(self.counts, device=means.device)[:, None, None, None] / total
        mean = (share * means).sum(0).mean(-1, keepdim=True)  # (B, G, 1)
        within = squares.sum(0).mean(-1, keepdim=True) / total
        between = (share * (means - mean).square()).sum(0).mean(-1, keepdim=True)
        inverse = torch.rsqrt(within + between + norm.eps)
        weight = norm.weight.float().view(norm.num_groups, -1) * inverse  # (B, G, C / G)
        shift = norm.bias.float().view(norm.num_groups, -1) - mean * weight
        return weight.flatten(1)[:, :, None, None], shift.flatten(1)[:, :, None, None]


def _same(strip: Tensor) -> Tensor:
    return strip


@dataclass(slots=True)
class FeatureMap:
    """A map (B, C, H, W) that is read and written in strips.

    Attributes:
        data: all of it, where the plan stores maps.
        statistics: of each strip as it was written; None where nobody asked for them.
    """

    data: Tensor
    plan: StripPlan
    statistics: _Statistics | None = None

    @classmethod
    def of(cls, tensor: Tensor, plan: StripPlan) -> FeatureMap:
        """Take a whole map; it is not written to."""
        return cls(tensor.to(plan.store), plan)

    def map(
        self,
        layer: Layer,
        channels: int,
        reach: Reach = POINT,
        *,
        beside: FeatureMap | None = None,
        inplace: bool = False,
        measured: bool = False,
    ) -> FeatureMap:
        """Compute a layer strip by strip.

        Args:
            layer: maps a strip (B, C, rows, W), and the same rows of `beside` where there is one,
                to a strip of the output; pads at the edges of what it is given.
            channels: of the output.
            reach: of the layer.
            beside: a map of the output's size, for layers that keep the size.
            inplace: write over this map, which must be as large as the output.
            measured: gather what a group norm of the output needs.
        """
        size = [reach.size(side) for side in self.data.shape[2:]]
        shape = (self.data.shape[0], channels, *size)
        data = self.data if inplace else self.plan.empty(shape, self.data.dtype)
        out = FeatureMap(data, self.plan, _Statistics() if measured else None)
        rows = self._rows(reach, channels)
        if inplace:  # the next strip's halo is read before this one is written over it
            rows = max(rows, reach.halo)
        waiting: list[tuple[int, Tensor]] = []
        for first, last in cuts(size[0], rows):
            start, stop, skipped = reach.needed(first, last, self.data.shape[2])
            others = () if beside is None else (beside._read(start, stop),)
            made = layer(self._read(start, stop), *others).narrow(2, skipped, last - first)
            del others
            waiting.append((first, made))
            del made
            if not inplace or len(waiting) > 1:
                out._write(*waiting.pop(0))
        for one in waiting:
            out._write(*one)
        return out

    def group_norm(
        self,
        norm: nn.GroupNorm,
        act: Callable[[Tensor], Tensor] | None = None,
        *,
        of: Callable[[Tensor], Tensor] = _same,
    ) -> Callable[[Tensor], Tensor]:
        """A group norm of this map, to be applied to strips of it.

        Args:
            norm: its groups, eps, weight and bias.
            act: applied to the float32 result, which it may overwrite.
            of: the norm is of what this makes of every pixel, not of the map itself.

        Returns:
            A function from a strip to the normed strip, in the strip's dtype.
        """
        found = self.statistics
        if found is None or of is not _same:
            found = _Statistics()
            for first, last in self._cuts():
                found.add(of(self._read(first, last)))
        scale, shift = found.affine(norm)

        def normed(strip: Tensor) -> Tensor:
            wide = torch.addcmul(shift, strip, scale)  # float32
            return (wide if act is None else act(wide)).to(strip.dtype)

        return normed

    def tokens(self, layer: Callable[[Tensor], Tensor], channels: int) -> Tensor:
        """What a layer makes of every pixel, on the device: (B, H W, channels).

        Args:
            layer: maps a strip (B, C, rows, W) to (B, rows W, channels).
            channels: of the result.
        """
        batch, _, height, width = self.data.shape
        shape = (batch, height * width, channels)
        out = torch.empty(shape, dtype=self.data.dtype, device=self.plan.device)
        for first, last in self._cuts():
            out[:, first * width : last * width] = layer(self._read(first, last))
        return out

    def whole(self) -> Tensor:
        """All of it on the device."""
        return self.data.to(self.plan.device)

    def _rows(self, reach: Reach, channels: int) -> int:
        _, before, height, width = self.data.shape
        if self.plan.rows:
            return -(-self.plan.rows * reach.size(height) // self.plan.latent_rows)
        return rows_for(reach, (before, channels), (height, width), self.data.dtype.itemsize)

    def _cuts(self) -> Iterator[tuple[int, int]]:
        return cuts(self.data.shape[2], self._rows(POINT, self.data.shape[1]))

    def _read(self, first: int, last: int) -> Tensor:
        strip = self.data[:, :, first:last]
        return strip.to(self.plan.device, copy=True) if self.plan.host else strip

    def _write(self, first: int, strip: Tensor) -> None:
        self.data[:, :, first : first + strip.shape[2]].copy_(strip)
        if self.statistics is not None:
            self.statistics.add(strip)
