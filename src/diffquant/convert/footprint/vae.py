"""Activations of decoding latents to a picture, for the autoencoders that circulate.

KL autoencoders (CompVis names) keep three maps of one size at their worst: a residual block's
input, its group norm, and the SiLU of that. Wan's and Qwen-Image's are made for video: Diffusers
keeps one frame of every convolution's input for the next frame, a still picture's too, and pads
each input by two frames in front (huggingface/diffusers@58eb52c:
src/diffusers/models/autoencoders/autoencoder_kl_wan.py, WanCausalConv3d, WanDecoder3d.forward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from diffquant.convert.architectures.names import count
from diffquant.convert.footprint.moments import Buffer, Moment, laid_out_again
from diffquant.convert.rules import Shapes

__all__ = ["decode_moments", "downscale_of"]

_USUAL_DOWNSCALE = 8
_DOUBLINGS = (".upsample.conv.weight", ".upsamplers.0.resample.1.weight")


def decode_moments(
    kind: str, shapes: Shapes, *, height: int, width: int, itemsize: int, copied: bool = False
) -> Iterator[Moment]:
    """Walk the decoding of one picture.

    Args:
        kind: of the component, a key of the table below.
        shapes: canonical part-local names.
        height: of the latents.
        width: of the latents.
        itemsize: bytes of a number of the compute dtype.
        copied: whether convolutions copy their input and output, as libraries do.
    """
    return _WALKS[kind](_Run(shapes, itemsize, copied), height, width)


def downscale_of(shapes: Shapes) -> int:
    """Pixels per latent pixel along a side, by a decoder's doublings; 8 where none is named."""
    doublings = sum(key.endswith(_DOUBLINGS) for key in shapes if key.startswith("decoder."))
    return 1 << doublings if doublings else _USUAL_DOWNSCALE


@dataclass(slots=True)
class _Run:
    """A decoder being walked.

    Attributes:
        frames: bytes kept for a next frame, by decoders of video.
    """

    shapes: Shapes
    itemsize: int
    copied: bool
    frames: list[int] = field(default_factory=list)

    def map(self, channels: int, height: int, width: int) -> int:
        """Bytes of one feature map."""
        return channels * height * width * self.itemsize

    def again(self, nbytes: int) -> Buffer:
        """A convolution's input and output laid out again, where they are."""
        return laid_out_again(nbytes, copied=self.copied)

    def out(self, key: str) -> int:
        """Output channels of a convolution."""
        return self.shapes[key][0]


def _kl(run: _Run, height: int, width: int) -> Iterator[Moment]:
    shapes = run.shapes
    channels = run.out("decoder.conv_in.weight")
    for name in ("decoder.mid.block_1", "decoder.mid.block_2"):
        yield from _resnet(run, name, channels, height, width)
    if "decoder.mid.attn_1.q.weight" in shapes:
        one = run.map(channels, height, width)
        buffers = (
            Buffer("the map and its norm", 2 * one, 2),
            Buffer("q, k, v, output", 4 * one, 4),
        )
        yield Moment("decoder.mid.attn_1: attention", buffers)
    for level in reversed(range(count(shapes, "decoder.up"))):
        for index in range(count(shapes, f"decoder.up.{level}.block")):
            name = f"decoder.up.{level}.block.{index}"
            yield from _resnet(run, name, channels, height, width)
            channels = run.out(f"{name}.conv1.weight")
        if f"decoder.up.{level}.upsample.conv.weight" in shapes:
            small = run.map(channels, height, width)
            height, width = 2 * height, 2 * width
            wide = run.map(channels, height, width)
            yield Moment(
                f"decoder.up.{level}.upsample: doubling",
                (
                    Buffer("the map", small),
                    Buffer("doubled", wide),
                    Buffer("its convolution", wide),
                    run.again(2 * wide),
                ),
            )
    one = run.map(channels, height, width)
    yield Moment("decoder.norm_out: norm and SiLU", (Buffer("the map, norm, SiLU", 3 * one, 3),))


def _resnet(run: _Run, name: str, before: int, height: int, width: int) -> Iterator[Moment]:
    after = run.out(f"{name}.conv1.weight")
    old, new = run.map(before, height, width), run.map(after, height, width)
    x = Buffer(f"the map ({before}x{height}x{width})", old)
    yield Moment(f"{name}: first norm", (x, Buffer("group norm", old), Buffer("SiLU", old)))
    yield Moment(
        f"{name}: first convolution",
        (x, Buffer("SiLU", old), Buffer("conv1", new), run.again(old + new)),
    )
    yield Moment(f"{name}: second norm", (x, Buffer("conv1, norm, SiLU", 3 * new, 3)))
    yield Moment(
        f"{name}: second convolution",
        (x, Buffer("SiLU and conv2", 2 * new, 2), run.again(2 * new)),
    )
    if f"{name}.nin_shortcut.weight" in run.shapes:
        yield Moment(f"{name}: sum", (x, Buffer("conv2, shortcut, sum", 3 * new, 3)))


def _video(run: _Run, height: int, width: int) -> Iterator[Moment]:
    """Wan's decoder, Diffusers names, over one frame."""
    shapes = run.shapes
    channels = run.out("decoder.conv_in.weight")
    latents = shapes["decoder.conv_in.weight"][1]
    yield from _causal(run, "decoder.conv_in", latents, height, width, 0)
    for index in range(count(shapes, "decoder.mid_block.resnets")):
        name = f"decoder.mid_block.resnets.{index}"
        yield from _video_resnet(run, name, channels, height, width)
    for level in range(count(shapes, "decoder.up_blocks")):
        block = f"decoder.up_blocks.{level}"
        for index in range(count(shapes, f"{block}.resnets")):
            name = f"{block}.resnets.{index}"
            yield from _video_resnet(run, name, channels, height, width)
            channels = run.out(f"{name}.conv1.weight")
        resample = f"{block}.upsamplers.0.resample.1.weight"
        if resample in shapes:
            small = run.map(channels, height, width)
            height, width = 2 * height, 2 * width
            wide = run.map(channels, height, width)
            channels = run.out(resample)
            yield Moment(
                f"{block}.upsamplers.0: doubling",
                (
                    *_kept(run),
                    Buffer("the map", small),
                    # interpolated in float32, cast back, convolved
                    Buffer("doubled in float32", wide // run.itemsize * 4),
                    Buffer("cast back", wide),
                ),
            )
    yield from _causal(run, "decoder.conv_out", channels, height, width, 1)


def _kept(run: _Run) -> tuple[Buffer, ...]:
    return (
        Buffer(f"{len(run.frames)} frames kept for the next", sum(run.frames), len(run.frames)),
    )


def _video_resnet(run: _Run, name: str, before: int, height: int, width: int) -> Iterator[Moment]:
    after = run.out(f"{name}.conv1.weight")
    shortcut = f"{name}.conv_shortcut.weight" in run.shapes
    held = 2 if shortcut else 1  # the shortcut's output waits beside the block's input
    yield from _causal(run, f"{name}.conv1", before, height, width, held)
    yield from _causal(run, f"{name}.conv2", after, height, width, held)


def _causal(
    run: _Run, name: str, channels: int, height: int, width: int, held: int
) -> Iterator[Moment]:
    """A convolution over three frames, of which two are padding; its input is kept."""
    shape = run.shapes[f"{name}.weight"]
    one = run.map(channels, height, width)
    run.frames.append(one)
    padded = run.map(channels, height + 2, width + 2) * shape[2]
    made = run.map(shape[0], height, width)
    yield Moment(
        f"{name}: convolution over {shape[2]} frames",
        (
            *_kept(run),
            Buffer("the block's input", held * one),
            Buffer("norm and SiLU", one),
            Buffer("padded", padded),
            Buffer("output and the level's input", 2 * made, 2),
        ),
    )


def _tiny(run: _Run, height: int, width: int, prefix: str = "") -> Iterator[Moment]:
    """TAESD's plain row of layers: a block holds its input, a convolution and its ReLU."""
    heads = (key.removeprefix(prefix).partition(".")[0] for key in run.shapes)
    for layer in sorted({int(one) for one in heads if one.isdigit()}):
        block, plain = f"{prefix}{layer}.conv.0.weight", f"{prefix}{layer}.weight"
        if block in run.shapes:
            inside = 3 * run.map(run.out(block), height, width)
            buffers = (Buffer("input, convolution, ReLU", inside, 3),)
            yield Moment(f"{prefix}{layer}: block", buffers)
        elif plain in run.shapes:
            if layer > 1 and f"{prefix}{layer}.bias" not in run.shapes:  # follows a doubling
                height, width = 2 * height, 2 * width
            both = 2 * run.map(run.out(plain), height, width)
            yield Moment(f"{prefix}{layer}: convolution", (Buffer("input and output", both, 2),))


def _tiny_whole(run: _Run, height: int, width: int) -> Iterator[Moment]:
    return _tiny(run, height, width, "decoder.layers.")


_WALKS: Mapping[str, Callable[[_Run, int, int], Iterator[Moment]]] = {
    "vae_kl": _kl,
    "vae_flux2": _kl,
    "vae_qwen": _video,
    "vae_tiny": _tiny_whole,
    "vae_tiny_decoder": _tiny,
}
