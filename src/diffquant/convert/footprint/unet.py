"""Activations of the UNets of the Stable Diffusion family, from CompVis names and shapes.

Walks the blocks as runtime/models/unet.py runs them, on the way down with one more skip each, on
the way up with one fewer. In each level three steps compete:

    the second convolution of a residual block   input, conv1, group norm, SiLU
    the gated feed-forward of a transformer      residuals, layer norm, both halves, GELU, product
    the doubling of the resolution               the map, four times as large, before and after

Attention never holds a matrix of scores: scaled_dot_product_attention is tiled. Convolutions count
without the unfolded copy (im2col) that some libraries make; the copies in another layout that
oneDNN and cuDNN make count when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffquant.convert.architectures.names import count
from diffquant.convert.footprint.moments import Buffer, Moment, laid_out_again
from diffquant.convert.rules import Shapes

__all__ = ["unet_moments"]


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same over a run."""

    shapes: Shapes
    batch: int
    itemsize: int
    copied: bool

    def map(self, channels: int, height: int, width: int) -> int:
        """Bytes of a (B, channels, height, width) feature map."""
        return self.batch * channels * height * width * self.itemsize

    def again(self, nbytes: int) -> Buffer:
        """A convolution's input and output laid out again, where they are."""
        return laid_out_again(nbytes, copied=self.copied)


def unet_moments(
    shapes: Shapes, *, height: int, width: int, batch: int, itemsize: int, copied: bool = False
) -> Iterator[Moment]:
    """Walk one call.

    Args:
        shapes: canonical part-local names.
        height: of the latents.
        width: of the latents.
        batch: samples in the call, guidance counted.
        itemsize: bytes of a number of the compute dtype.
        copied: whether convolutions copy their input and output, as libraries do.
    """
    run = _Run(shapes, batch, itemsize, copied)
    skips: list[tuple[int, int, int]] = []  # (channels, height, width) of each input block's output
    channels = shapes["input_blocks.0.0.weight"][0]
    skips.append((channels, height, width))
    for index in range(1, count(shapes, "input_blocks")):
        for name in _layers(shapes, f"input_blocks.{index}"):
            held = _skips(run, skips)
            yield from _layer(run, name, channels, (height, width), held)
            channels, height, width = _after(shapes, name, channels, (height, width))
        skips.append((channels, height, width))
    for name in _layers(shapes, "middle_block"):
        yield from _layer(run, name, channels, (height, width), _skips(run, skips))
        channels = _after(shapes, name, channels, (height, width))[0]
    for index in range(count(shapes, "output_blocks")):
        skip, height, width = skips.pop()
        below = Buffer("the map before it", run.map(channels, height, width))
        channels += skip
        joined = run.map(channels, height, width)
        held = (*_skips(run, skips), Buffer("the joined map", joined))
        taken = Buffer("the skip", run.map(skip, height, width))
        yield Moment(f"output_blocks.{index}: joining the skip", (*held, below, taken))
        for name in _layers(shapes, f"output_blocks.{index}"):
            first = name.endswith(".0")
            yield from _layer(run, name, channels, (height, width), held, is_held=first)
            target = skips[-1][1:] if skips else (height, width)
            channels, height, width = _after(shapes, name, channels, (height, width), target)
    yield from _output(run, channels, height, width)


def _layers(shapes: Shapes, block: str) -> list[str]:
    return [f"{block}.{index}" for index in range(count(shapes, block))]


def _skips(run: _Run, skips: list[tuple[int, int, int]]) -> tuple[Buffer, ...]:
    label = "1 skip" if len(skips) == 1 else f"{len(skips)} skips"
    return (Buffer(label, sum(run.map(*one) for one in skips), max(len(skips), 1)),)


def _after(
    shapes: Shapes,
    name: str,
    channels: int,
    size: tuple[int, int],
    target: tuple[int, int] | None = None,
) -> tuple[int, int, int]:
    """Channels and size after a layer; `target` is the size a doubling aims at."""
    height, width = size
    if f"{name}.in_layers.2.weight" in shapes:
        return shapes[f"{name}.in_layers.2.weight"][0], height, width
    if f"{name}.op.weight" in shapes:
        return channels, -(-height // 2), -(-width // 2)
    if f"{name}.conv.weight" in shapes:
        return channels, *(target or (2 * height, 2 * width))
    return channels, height, width


def _layer(
    run: _Run,
    name: str,
    channels: int,
    size: tuple[int, int],
    held: tuple[Buffer, ...],
    *,
    is_held: bool = False,
) -> Iterator[Moment]:
    """Moments of one layer; `is_held` says that its input is among `held` already."""
    shapes = run.shapes
    own = () if is_held else (Buffer("the map", run.map(channels, *size)),)
    if f"{name}.in_layers.2.weight" in shapes:
        yield from _residual(run, name, size, (*held, *own))
    elif f"{name}.proj_in.weight" in shapes:
        yield from _transformer(run, name, size, (*held, *own))
    elif f"{name}.conv.weight" in shapes:
        wide = run.map(channels, 2 * size[0], 2 * size[1])
        buffers = (
            Buffer("the doubled map", wide),
            Buffer("its convolution", wide),
            run.again(2 * wide),
        )
        yield Moment(f"{name}: doubling", (*held, *own, *buffers))


def _residual(
    run: _Run, name: str, size: tuple[int, int], held: tuple[Buffer, ...]
) -> Iterator[Moment]:
    after, before = run.shapes[f"{name}.in_layers.2.weight"][:2]
    old, new = run.map(before, *size), run.map(after, *size)
    yield Moment(f"{name}: first norm", (*held, Buffer("group norm and SiLU", 2 * old, 2)))
    yield Moment(
        f"{name}: first convolution",
        (*held, Buffer("SiLU", old), Buffer("convolution", new), run.again(old + new)),
    )
    skip = new if f"{name}.skip_connection.weight" in run.shapes else 0
    yield Moment(
        f"{name}: second norm",
        (*held, Buffer("shortcut", skip), Buffer("conv1, norm, SiLU", 3 * new, 3)),
    )
    yield Moment(
        f"{name}: second convolution",
        (
            *held,
            Buffer("shortcut", skip),
            Buffer("SiLU and convolution", 2 * new, 2),
            run.again(2 * new),
        ),
    )


def _transformer(
    run: _Run, name: str, size: tuple[int, int], held: tuple[Buffer, ...]
) -> Iterator[Moment]:
    shapes = run.shapes
    channels = shapes[f"{name}.proj_in.weight"][0]
    hidden = shapes[f"{name}.transformer_blocks.0.ff.net.2.weight"][1]
    tokens, inner = run.map(channels, *size), run.map(hidden, *size)
    # runtime/models/unet.py: the map after proj_in waits below the first block's residual, whose
    # attention outputs and norms follow one another
    yield Moment(
        f"{name}: attention",
        (
            *held,
            Buffer("residuals and norm", 4 * tokens, 4),
            Buffer("q, k, v, output", 4 * tokens, 4),
        ),
    )
    yield Moment(
        f"{name}: gated feed-forward",
        (
            *held,
            Buffer("residuals and norm", 4 * tokens, 4),
            Buffer("both halves", 2 * inner),
            Buffer("GELU", inner),
            Buffer("product", inner),
        ),
    )


def _output(run: _Run, channels: int, height: int, width: int) -> Iterator[Moment]:
    one = run.map(channels, height, width)
    yield Moment("out: norm and SiLU", (Buffer("the map, norm, SiLU", 3 * one, 3),))
