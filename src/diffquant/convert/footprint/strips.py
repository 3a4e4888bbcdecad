"""Activations of decoding in strips, as runtime/models/feature_map.py does it.

On the device are, at each layer: its input and its output, unless maps lie in host memory; then a
strip of each and what the layer makes on the way. A residual block's second convolution is written
over its first one's, so that a block holds two maps, its input beside them. The middle attention
keeps the keys and values of all pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from diffquant.convert.architectures.names import count
from diffquant.convert.footprint.moments import Buffer, Moment, laid_out_again
from diffquant.convert.footprint.reach import CONV, DOUBLE, POINT, Reach, rows_for
from diffquant.convert.rules import Shapes

__all__ = ["strip_moments"]

_RGB = 3
_FLOAT32 = 4
_BLOCK = Reach(3)  # a block of TAESD: three convolutions

_Size = tuple[int, int]


def strip_moments(
    kind: str,
    shapes: Shapes,
    *,
    height: int,
    width: int,
    itemsize: int,
    copied: bool = False,
    host: bool = False,
) -> Iterator[Moment]:
    """Walk the decoding of one picture in strips.

    Args:
        kind: of the component, a key of the table below.
        shapes: canonical part-local names.
        height: of the latents.
        width: of the latents.
        itemsize: bytes of a number of the compute dtype.
        copied: whether convolutions copy their input and output, as libraries do.
        host: whether maps lie in host memory.
    """
    return _WALKS[kind](_Run(shapes, itemsize, copied, host), (height, width))


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same over a walk; see strip_moments."""

    shapes: Shapes
    itemsize: int
    copied: bool
    host: bool

    def out(self, key: str) -> int:
        """Output channels of a convolution."""
        return self.shapes[key][0]

    def layer(
        self,
        where: str,
        channels: tuple[int, int],
        size: _Size,
        reach: Reach = CONV,
        *,
        norm: str = "",
        beside: int = 0,
        inplace: bool = False,
        measured: bool = False,
    ) -> Iterator[Moment]:
        """One layer over a map, in strips.

        Args:
            where: name of the layer.
            channels: of its input and output.
            size: of its input.
            reach: of the layer.
            norm: "group" or "rms", "" without one.
            beside: channels of the map that is added to what the layer makes.
            inplace: whether the output is written over the input.
            measured: whether the output's statistics are gathered.
        """
        strip = _Strip(self, channels, size, reach, inplace=inplace)
        held = strip.held(beside)
        if norm:
            yield Moment(f"{where}: norm of a strip", (*held, *_NORMS[norm](strip)))
        read = strip.bytes_in if norm else 0
        seen = strip.bytes_in * reach.up**2
        yield Moment(
            f"{where}: convolution of a strip",
            (
                *held,
                Buffer("a strip", read),
                Buffer("doubled", seen if reach.up > 1 else 0),
                Buffer("convolved", strip.bytes_out),
                laid_out_again(seen + strip.bytes_out, copied=self.copied),
            ),
        )
        if beside:
            terms = 2 if beside == channels[1] else 3  # with a shortcut's convolution
            told = Buffer("convolved, shortcut, sum", terms * strip.bytes_out, terms)
            yield Moment(f"{where}: sum of a strip", (*held, told))
        if measured:
            wide = strip.bytes_out // self.itemsize * _FLOAT32
            told = Buffer("less its mean, in float32", wide)
            yield Moment(
                f"{where}: statistics of a strip",
                (*held, Buffer("convolved", strip.bytes_out), told),
            )


@dataclass(frozen=True, slots=True)
class _Strip:
    """The largest strip of a layer."""

    run: _Run
    channels: tuple[int, int]
    size: _Size
    reach: Reach
    inplace: bool

    @property
    def rows(self) -> int:
        """Rows of the output."""
        rows = rows_for(self.reach, self.channels, self.size, self.run.itemsize)
        return max(rows, self.reach.halo) if self.inplace else rows

    @property
    def rows_in(self) -> int:
        """Rows of the input, halo and all."""
        rows = -(-self.rows * self.reach.down // self.reach.up) + 2 * self.reach.halo
        return min(self.size[0], rows)

    @property
    def bytes_in(self) -> int:
        """Bytes of a strip of the input."""
        return self.channels[0] * self.rows_in * self.size[1] * self.run.itemsize

    @property
    def bytes_out(self) -> int:
        """Bytes of what the layer makes of it, halo and all."""
        rows, width = (self.reach.size(side) for side in (self.rows_in, self.size[1]))
        return self.channels[1] * rows * width * self.run.itemsize

    def held(self, beside: int = 0) -> tuple[Buffer, ...]:
        """What lives all along: maps, or strips of them; and the strip before, not yet written."""
        before, after = self.channels
        height, width = self.size
        waits = self.inplace and self.rows < self.reach.size(height)
        waiting = Buffer("the strip before", self.bytes_out if waits else 0)
        if self.run.host:
            other = self.bytes_in // before * beside
            return Buffer("strips from the host", self.bytes_in + other), waiting
        one = height * width * self.run.itemsize
        made = self.reach.size(height) * self.reach.size(width) * self.run.itemsize
        return (
            Buffer(f"the map ({before}x{height}x{width})", before * one),
            Buffer("its output", 0 if self.inplace else after * made),
            Buffer("the block's input", beside * one),
            waiting,
        )


def _group(strip: _Strip) -> tuple[Buffer, ...]:
    narrow = strip.bytes_in if strip.run.itemsize < _FLOAT32 else 0
    wide = strip.bytes_in // strip.run.itemsize * _FLOAT32
    return Buffer("normed in float32", wide), Buffer("cast back", narrow)


def _rms(strip: _Strip) -> tuple[Buffer, ...]:
    # In float32 the strip is its own copy, and three products live at once.
    copies = 2 if strip.run.itemsize < _FLOAT32 else 3
    wide = strip.bytes_in // strip.run.itemsize * _FLOAT32
    return (Buffer("normed in float32", copies * wide, copies),)


_NORMS: Mapping[str, Callable[[_Strip], tuple[Buffer, ...]]] = {"group": _group, "rms": _rms}


def _kl(run: _Run, size: _Size) -> Iterator[Moment]:
    shapes = run.shapes
    channels = run.out("decoder.conv_in.weight")
    sides = (shapes["decoder.conv_in.weight"][1], channels)
    yield from run.layer("decoder.conv_in", sides, size, measured=True)
    yield from _resnet(run, "decoder.mid.block_1", channels, size, "group")
    if "decoder.mid.attn_1.q.weight" in shapes:
        yield from _attention(run, "decoder.mid.attn_1", channels, size, "group")
    yield from _resnet(run, "decoder.mid.block_2", channels, size, "group")
    for level in reversed(range(count(shapes, "decoder.up"))):
        for index in range(count(shapes, f"decoder.up.{level}.block")):
            name = f"decoder.up.{level}.block.{index}"
            yield from _resnet(run, name, channels, size, "group")
            channels = run.out(f"{name}.conv1.weight")
        if f"decoder.up.{level}.upsample.conv.weight" in shapes:
            name, sides = f"decoder.up.{level}.upsample", (channels, channels)
            yield from run.layer(name, sides, size, DOUBLE, measured=True)
            size = (2 * size[0], 2 * size[1])
    yield from run.layer("decoder.conv_out", (channels, _RGB), size, norm="group")


def _qwen(run: _Run, size: _Size) -> Iterator[Moment]:
    shapes = run.shapes
    channels = run.out("decoder.conv_in.weight")
    sides = (shapes["decoder.conv_in.weight"][1], channels)
    yield from run.layer("decoder.conv_in", sides, size)
    yield from _resnet(run, "decoder.mid_block.resnets.0", channels, size, "rms")
    yield from _attention(run, "decoder.mid_block.attentions.0", channels, size, "rms")
    for level in range(count(shapes, "decoder.up_blocks")):
        block = f"decoder.up_blocks.{level}"
        for index in range(count(shapes, f"{block}.resnets")):
            name = f"{block}.resnets.{index}"
            yield from _resnet(run, name, channels, size, "rms")
            channels = run.out(f"{name}.conv1.weight")
        resample = f"{block}.upsamplers.0.resample.1.weight"
        if resample in shapes:
            sides = (channels, run.out(resample))
            yield from run.layer(f"{block}.upsamplers.0", sides, size, DOUBLE)
            channels, size = sides[1], (2 * size[0], 2 * size[1])
    yield from run.layer("decoder.conv_out", (channels, _RGB), size, norm="rms")


def _resnet(run: _Run, name: str, before: int, size: _Size, norm: str) -> Iterator[Moment]:
    after, measured = run.out(f"{name}.conv1.weight"), norm == "group"
    yield from run.layer(f"{name}.conv1", (before, after), size, norm=norm, measured=measured)
    yield from run.layer(
        f"{name}.conv2",
        (after, after),
        size,
        norm=norm,
        beside=before,
        inplace=True,
        measured=measured,
    )


def _attention(run: _Run, name: str, channels: int, size: _Size, norm: str) -> Iterator[Moment]:
    """Keys and values of all pixels; queries strip by strip."""
    strip = _Strip(run, (channels, channels), size, POINT, inplace=True)
    both = 2 * channels * size[0] * size[1] * run.itemsize
    held = (*strip.held(), Buffer("keys and values", both, 2))
    yield Moment(f"{name}: norm of a strip", (*held, *_NORMS[norm](strip)))
    told = Buffer("tokens, found, projected, sum", 4 * strip.bytes_in, 4)
    yield Moment(f"{name}: attention of a strip", (*held, told))


def _tiny(run: _Run, size: _Size, prefix: str = "") -> Iterator[Moment]:
    """TAESD's plain row of layers; a layer that a doubling precedes has no bias."""
    heads = (key.removeprefix(prefix).partition(".")[0] for key in run.shapes)
    for layer in sorted({int(one) for one in heads if one.isdigit()}):
        block, plain = f"{prefix}{layer}.conv.0.weight", f"{prefix}{layer}.weight"
        if block in run.shapes:
            after, before = run.shapes[block][:2]
            strip = _Strip(run, (before, after), size, _BLOCK, inplace=before == after)
            inside = Buffer("convolution and ReLU", 2 * strip.bytes_out, 2)
            again = laid_out_again(2 * strip.bytes_out, copied=run.copied)
            yield Moment(f"{prefix}{layer}: block of a strip", (*strip.held(), inside, again))
        elif plain in run.shapes:
            after, before = run.shapes[plain][:2]
            doubles = layer > 1 and f"{prefix}{layer}.bias" not in run.shapes
            reach = DOUBLE if doubles else CONV
            yield from run.layer(f"{prefix}{layer}", (before, after), size, reach)
            size = (size[0] * reach.up, size[1] * reach.up)


def _tiny_whole(run: _Run, size: _Size) -> Iterator[Moment]:
    return _tiny(run, size, "decoder.layers.")


_WALKS: Mapping[str, Callable[[_Run, _Size], Iterator[Moment]]] = {
    "vae_kl": _kl,
    "vae_flux2": _kl,
    "vae_qwen": _qwen,
    "vae_tiny": _tiny_whole,
    "vae_tiny_decoder": _tiny,
}
