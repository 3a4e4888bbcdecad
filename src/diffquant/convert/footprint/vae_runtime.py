"""Activations of this package's autoencoders where vae.py has none: encoding, and single pictures.

Encoding walks a decoder's levels the other way round, at half the channels: it is needed where a
run starts from a picture. Qwen-Image's autoencoder runs here as a first frame alone (see
runtime/models/vae_qwen.py), without the frames that other programs keep for a next one; its norm
works in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from diffquant.convert.architectures.names import count
from diffquant.convert.footprint.moments import Buffer, Moment, laid_out_again
from diffquant.convert.rules import Shapes

__all__ = ["encode_moments", "still_moments"]

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays the same over a walk.

    Attributes:
        wide_norm: whether norms hold their input and output in float32, as the RMS norm does.
    """

    shapes: Shapes
    itemsize: int
    copied: bool
    wide_norm: bool

    def map(self, channels: int, size: tuple[int, int]) -> int:
        """Bytes of one feature map."""
        return channels * size[0] * size[1] * self.itemsize

    def channels(self, key: str, axis: int = 0) -> int:
        """Output channels of a convolution; input ones along axis 1."""
        return self.shapes[key][axis]

    def norm(self, nbytes: int) -> Buffer:
        """What a norm holds beside its input."""
        if self.wide_norm:  # the input in float32, and its quotient by the root of squares
            return Buffer("norm in float32", 2 * nbytes // self.itemsize * _FLOAT32, 2)
        return Buffer("norm and SiLU", 2 * nbytes, 2)

    def again(self, nbytes: int) -> Buffer:
        """A convolution's input and output laid out again, where they are."""
        return laid_out_again(nbytes, copied=self.copied)


def encode_moments(
    kind: str, shapes: Shapes, *, height: int, width: int, itemsize: int, copied: bool = False
) -> Iterator[Moment]:
    """Walk the encoding of one picture.

    Args:
        kind: of the component, a key of the table below.
        shapes: canonical part-local names.
        height: of the picture.
        width: of the picture.
        itemsize: bytes of a number of the compute dtype.
        copied: whether convolutions copy their input and output, as libraries do.
    """
    run = _Run(shapes, itemsize, copied, wide_norm=kind == "vae_qwen")
    return _ENCODERS[kind](run, (height, width))


def still_moments(
    shapes: Shapes, *, height: int, width: int, itemsize: int, copied: bool = False
) -> Iterator[Moment]:
    """Walk the decoding of one picture by Qwen-Image's autoencoder; sizes of the latents."""
    run = _Run(shapes, itemsize, copied, wide_norm=True)
    size = (height, width)
    channels = run.channels("decoder.conv_in.weight")
    for index in range(count(shapes, "decoder.mid_block.resnets")):
        yield from _resnet(run, f"decoder.mid_block.resnets.{index}", channels, size)
    for level in range(count(shapes, "decoder.up_blocks")):
        block = f"decoder.up_blocks.{level}"
        for index in range(count(shapes, f"{block}.resnets")):
            name = f"{block}.resnets.{index}"
            yield from _resnet(run, name, channels, size)
            channels = run.channels(f"{name}.conv1.weight")
        resample = f"{block}.upsamplers.0.resample.1.weight"
        if resample in shapes:
            small, size = run.map(channels, size), (2 * size[0], 2 * size[1])
            doubled = run.map(channels, size)
            channels = run.channels(resample)
            made = run.map(channels, size)
            yield Moment(
                f"{block}.upsamplers.0: doubling",
                (
                    Buffer("the map", small),
                    Buffer("doubled", doubled),
                    Buffer("its convolution", made),
                    run.again(doubled + made),
                ),
            )


def _levels(run: _Run, size: tuple[int, int]) -> Iterator[Moment]:
    """A KL encoder, CompVis names."""
    shapes = run.shapes
    channels = run.channels("encoder.conv_in.weight")
    for level in range(count(shapes, "encoder.down")):
        for index in range(count(shapes, f"encoder.down.{level}.block")):
            name = f"encoder.down.{level}.block.{index}"
            yield from _resnet(run, name, channels, size)
            channels = run.channels(f"{name}.conv1.weight")
        if f"encoder.down.{level}.downsample.conv.weight" in shapes:
            name = f"encoder.down.{level}.downsample"
            yield _halving(run, name, channels, channels, size)
            size = (size[0] // 2, size[1] // 2)
    for name in ("encoder.mid.block_1", "encoder.mid.block_2"):
        yield from _resnet(run, name, channels, size)


def _flat(run: _Run, size: tuple[int, int]) -> Iterator[Moment]:
    """Qwen-Image's encoder: one list of blocks, some of which halve the picture."""
    channels = run.channels("encoder.conv_in.weight")
    for index in range(count(run.shapes, "encoder.down_blocks")):
        name = f"encoder.down_blocks.{index}"
        if f"{name}.resample.1.weight" in run.shapes:
            after = run.channels(f"{name}.resample.1.weight")
            yield _halving(run, name, channels, after, size)
            channels, size = after, (size[0] // 2, size[1] // 2)
        else:
            yield from _resnet(run, name, channels, size)
            channels = run.channels(f"{name}.conv1.weight")


def _tiny(run: _Run, size: tuple[int, int], prefix: str = "encoder.layers.") -> Iterator[Moment]:
    """TAESD: its first block, at full resolution, holds its input, a convolution and its ReLU."""
    one = run.map(run.channels(f"{prefix}0.weight"), size)
    yield Moment(f"{prefix}1: block", (Buffer("input, convolution, ReLU", 3 * one, 3),))


def _tiny_alone(run: _Run, size: tuple[int, int]) -> Iterator[Moment]:
    return _tiny(run, size, "")


def _resnet(run: _Run, name: str, before: int, size: tuple[int, int]) -> Iterator[Moment]:
    after = run.channels(f"{name}.conv1.weight")
    old, new = run.map(before, size), run.map(after, size)
    x = Buffer("the map", old)
    yield Moment(f"{name}: first norm", (x, run.norm(old)))
    yield Moment(
        f"{name}: first convolution",
        (x, Buffer("SiLU", old), Buffer("conv1", new), run.again(old + new)),
    )
    yield Moment(f"{name}: second norm", (x, Buffer("conv1", new), run.norm(new)))
    yield Moment(
        f"{name}: second convolution",
        (x, Buffer("SiLU and conv2", 2 * new, 2), run.again(2 * new)),
    )


def _halving(run: _Run, name: str, before: int, after: int, size: tuple[int, int]) -> Moment:
    old, padded = run.map(before, size), run.map(before, (size[0] + 1, size[1] + 1))
    made = run.map(after, (size[0] // 2, size[1] // 2))
    return Moment(
        f"{name}: halving",
        (
            Buffer("the map", old),
            Buffer("padded", padded),
            Buffer("its convolution", made),
            run.again(padded + made),
        ),
    )


_ENCODERS: Mapping[str, Callable[[_Run, tuple[int, int]], Iterator[Moment]]] = {
    "vae_kl": _levels,
    "vae_flux2": _levels,
    "vae_qwen": _flat,
    "vae_tiny": _tiny,
    "vae_tiny_encoder": _tiny_alone,
}
