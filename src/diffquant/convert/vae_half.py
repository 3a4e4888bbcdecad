"""Make a KL autoencoder safe in half precision: the same pictures from smaller activations.

Some autoencoders (SDXL's) reach activations beyond 65504, which float16 has not: black or broken
pictures. The residual stream of such a model passes through nothing but group norms and
convolutions, and a group norm does not see how large its input is. So the stream may run at 1/s of
its size: what writes to it is divided by s, and where a convolution makes the next stream of it,
the ratio of the two goes into that convolution's weights::

    conv_in -> + conv2 -> + proj_out -> nin_shortcut -> + conv2 -> upsample -> ... -> norm_out
    |------ stream of scale a ---------|--- of scale b -----------|--- of scale c ---|

Scales are powers of two, so weights keep their digits; what is left of a difference is the norms'
epsilon (1e-6), which now weighs s * s times more against the variance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import ROWS
from diffquant.convert.rules import Shapes

__all__ = ["HALF_MAX", "Scaled", "Stream", "half_safe_factors", "streams"]

HALF_MAX = 65504.0  # largest finite float16
_HEADROOM = 8.0  # what is measured on a few pictures may be exceeded by others


@dataclass(frozen=True, slots=True)
class Scaled:
    """An adapter: a weight times a power of two."""

    factor: float
    name: str = "half-precision scale"
    reach: str = ROWS

    def apply(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the scaled rows."""
        return np.asarray(weight * np.float32(self.factor), np.float32)


@dataclass(frozen=True, slots=True)
class Stream:
    """A stretch of the residual stream between two convolutions.

    Attributes:
        opener: module that makes it: conv_in, or the convolution that carries the one before over.
        writers: modules that add to it.
        nodes: modules whose output is the stream itself.
    """

    opener: str
    writers: tuple[str, ...]
    nodes: tuple[str, ...]


def streams(shapes: Shapes, half: str) -> tuple[Stream, ...]:
    """The stretches of `half` ("encoder" or "decoder"), in order; canonical names."""
    found = [_Open(f"{half}.conv_in")]
    for kind, name in _order(shapes, half):
        if kind == "resample":
            found.append(_Open(f"{name}.conv"))
        elif kind == "attention":
            found[-1].add((f"{name}.proj_out",), name)
        else:
            if f"{name}.nin_shortcut.weight" in shapes:
                found.append(_Open(f"{name}.nin_shortcut"))
            found[-1].add((f"{name}.conv2",), name)
    return tuple(Stream(one.opener, tuple(one.writers), tuple(one.nodes)) for one in found)


class _Open:
    def __init__(self, opener: str) -> None:
        self.opener = opener
        self.writers: list[str] = []
        self.nodes = [opener]

    def add(self, writers: Sequence[str], node: str) -> None:
        self.writers += writers
        self.nodes.append(node)


def _order(shapes: Shapes, half: str) -> list[tuple[str, str]]:
    """(kind, module) in the order in which the model runs them."""
    stack, resample = ("up", "upsample") if half == "decoder" else ("down", "downsample")
    levels = sorted({int(m[1]) for m in _matches(rf"{half}\.{stack}\.(\d+)\.", shapes)})
    middle = [
        ("attention" if name.startswith("attn") else "resnet", f"{half}.mid.{name}")
        for name in ("block_1", "attn_1", "block_2")
        if any(key.startswith(f"{half}.mid.{name}.") for key in shapes)
    ]
    body: list[tuple[str, str]] = []
    for level in reversed(levels) if half == "decoder" else levels:
        head = f"{half}.{stack}.{level}"
        blocks = {int(m[1]) for m in _matches(rf"{re.escape(head)}\.block\.(\d+)\.", shapes)}
        body += [("resnet", f"{head}.block.{index}") for index in sorted(blocks)]
        if f"{head}.{resample}.conv.weight" in shapes:
            body.append(("resample", f"{head}.{resample}"))
    return middle + body if half == "decoder" else body + middle


def _matches(pattern: str, shapes: Shapes) -> list[re.Match[str]]:
    return [found for key in shapes if (found := re.match(pattern, key))]


def half_safe_factors(shapes: Shapes, peaks: Mapping[str, float]) -> dict[str, float]:
    """Canonical key -> power of two to multiply it by, for the tensors that have to change.

    Args:
        shapes: of the autoencoder, canonical part-local names.
        peaks: module -> largest absolute output, measured.
    """
    factors: dict[str, float] = {}
    for half in ("encoder", "decoder"):
        if f"{half}.conv_in.weight" not in shapes:
            continue
        before = 1.0
        for stream in streams(shapes, half):
            scale = _scale(max(peaks.get(node, 0.0) for node in stream.nodes))
            _put(factors, stream.opener, before / scale, 1 / scale)
            for writer in stream.writers:
                _put(factors, writer, 1 / scale, 1 / scale)
            before = scale
        for kind, name in _order(shapes, half):
            if kind == "resnet":  # what norm2 reads, by itself
                inside = 1 / _scale(peaks.get(f"{name}.conv1", 0.0))
                _put(factors, f"{name}.conv1", inside, inside)
    return {key: one for key, one in factors.items() if one != 1.0 and key in shapes}


def _scale(peak: float) -> float:
    """The power of two that brings a peak below the limit, with headroom."""
    limit = HALF_MAX / _HEADROOM
    return 2.0 ** math.ceil(math.log2(peak / limit)) if peak > limit else 1.0


def _put(factors: dict[str, float], module: str, weight: float, bias: float) -> None:
    factors[f"{module}.weight"] = weight
    factors[f"{module}.bias"] = bias
