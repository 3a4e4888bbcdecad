"""Plain data of an estimate: what picture is asked for, and what each stage of making it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffquant.convert.footprint.moments import Buffer, Moment
from diffquant.convert.footprint.weights import PartSource, PartWeights
from diffquant.convert.match import PartMatch
from diffquant.convert.rules import Shapes
from diffquant.core.dtypes import STORAGE

__all__ = ["Footprint", "Picture", "Run", "Stage"]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is to be made.

    Attributes:
        width, height: in pixels.
        batch: pictures at once; guidance doubles it where both predictions run together.
        compute: STORAGE name of the dtype computed in.
        copied: whether convolutions copy their input and output into a layout of their own, as
            oneDNN does on a CPU and cuDNN on a GPU (measured: docs/lab-log.md).
    """

    width: int
    height: int
    batch: int = 1
    compute: str = "BF16"
    copied: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the compute dtype."""
        return STORAGE[self.compute].block_nbytes

    def over(self, downscale: int) -> tuple[int, int]:
        """(height, width) in units of so many pixels, rounded up."""
        return -(-self.height // downscale), -(-self.width // downscale)


@dataclass(frozen=True, slots=True)
class Stage:
    """One part at work.

    Attributes:
        name: encode, "encode picture", denoise or decode.
        part: denoiser, vae, text_encoder ... or the name of a companion.
        title: of the part, for people.
        in_file: whether the file holds it; else `weights` are an estimate.
        source: where its sizes come from.
        weights: of the part.
        activations: the moment at which most is in memory.
        largest: the largest tensor that is no weight.
        tiled: the moment when the picture is decoded (or encoded) in strips; None for other stages.
        host: likewise, with feature maps in host memory.
    """

    name: str
    part: str
    title: str
    in_file: bool
    source: str
    weights: PartWeights
    activations: Moment
    largest: Buffer
    tiled: Moment | None = None
    host: Moment | None = None

    @property
    def scratch(self) -> int:
        """Bytes that decoding a packed weight takes."""
        return self.weights.scratch.nbytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Stages in the order they run, and what was assumed.

    Attributes:
        guided: whether classifier-free guidance is counted, as the architecture's defaults have it.
    """

    architecture: str
    variant: str
    picture: Picture
    guided: bool
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One estimate being made.

    Attributes:
        parts: part name -> where its weights are.
        shapes: part name -> canonical shapes.
        estimates: whether parts that are missing are estimated.
        ours: whether the runtime of this package runs it, else other programs as far as known.
        notes: filled with what was assumed or left out.
    """

    architecture: str
    variant: str
    picture: Picture
    guided: bool
    parts: Mapping[str, PartSource]
    shapes: Mapping[str, Shapes]
    estimates: bool
    ours: bool
    notes: list[str]

    def part(self, name: str) -> PartMatch | None:
        """The part of that name, where there is one."""
        found = self.parts.get(name)
        return found.part if found is not None else None

    def compute(self, name: str) -> str:
        """STORAGE name of the dtype that a part computes in."""
        found = self.parts.get(name)
        return (found.compute if found is not None else "") or self.picture.compute

    def itemsize(self, name: str) -> int:
        """Bytes of a number of that dtype."""
        return STORAGE[self.compute(name)].block_nbytes
