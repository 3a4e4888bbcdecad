"""What making one picture takes, part by part and stage by stage, before a byte moves.

    footprint()         one file; parts it lacks are estimated from what the architecture runs with
    parts_footprint()   parts that are all at hand, each from its own file, as the runtime has them

A picture has three stages: text is encoded, the denoiser runs once per step, latents are decoded.
One that starts from a picture encodes it first. Each holds the weights of its part, its
activations, and what decoding a packed weight takes for a moment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import TITLES, VAE_TITLES
from diffquant.convert.architectures.spaces import SPACES
from diffquant.convert.footprint.companions import COMPANIONS, companions_of
from diffquant.convert.footprint.decode import ServedBy, usually
from diffquant.convert.footprint.encoders import encoder_moment, sizes_of
from diffquant.convert.footprint.moments import Buffer, Moment, largest_buffer, peak
from diffquant.convert.footprint.transformer import row_for, transformer_moments
from diffquant.convert.footprint.unet import unet_moments
from diffquant.convert.footprint.vae import TILE, decode_moments, downscale_of
from diffquant.convert.footprint.vae_runtime import encode_moments, still_moments
from diffquant.convert.footprint.vae_usual import usual_vae
from diffquant.convert.footprint.weights import (
    PartSource,
    PartWeights,
    canonical_shapes,
    companion_weights,
    part_weights,
)
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match, PartMatch
from diffquant.convert.rules import Shapes
from diffquant.core.dtypes import STORAGE

__all__ = ["Footprint", "Picture", "Stage", "footprint", "parts_footprint", "with_denoiser"]

_FLOAT32 = 4
_LATENT_COPIES = 3  # latents, prediction and the sampler's own, in float32
_RGB = 3
_VIDEO = ("wan", "hunyuan", "ltx")


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
        tiled: the moment when the picture is decoded in tiles; None for other stages.
        host: the same with maps that lie in host memory; None where nobody does that.
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
class _Run:
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


def footprint(
    logical: LogicalSource,
    match: Match,
    picture: Picture,
    *,
    served_by: ServedBy | None = None,
    ours: bool = False,
) -> Footprint:
    """Estimate what making a picture with a file takes.

    A file that holds one part alone, a VAE or a text encoder, has the stage of that part.

    Args:
        logical: the opened file.
        match: what it is.
        picture: what is to be made.
        served_by: what decodes packed weights; a GPU with Triton where not given.
        ours: whether the runtime of this package runs it, else other programs as far as known.
    """
    row = ARCHITECTURES.get(match.architecture)
    served_by = served_by or usually("cuda")
    parts = {one.name: PartSource(logical, one, served_by=served_by) for one in match.parts}
    guided = row is not None and row.sampling_for(match.variant).cfg > 1
    run = _run(parts, picture, match.architecture, match.variant, guided=guided, ours=ours)
    return _found(run, _denoiser(run))


def parts_footprint(
    parts: Mapping[str, PartSource],
    picture: Picture,
    *,
    architecture: str,
    variant: str = "",
    guided: bool,
    from_picture: bool = False,
) -> Footprint:
    """What making a picture with these parts takes in the runtime of this package.

    Args:
        parts: part name -> where it comes from, all that the architecture needs.
        picture: what is to be made.
        architecture: slug, of the denoiser.
        variant: member of the family.
        guided: whether a negative prompt is run beside the prompt.
        from_picture: whether a picture is encoded first.
    """
    run = _run(parts, picture, architecture, variant, guided=guided, ours=True, estimates=False)
    first = _picture_encoder(run) if from_picture else ()
    return _found(run, (*first, *_denoiser(run)))


def _run(
    parts: Mapping[str, PartSource],
    picture: Picture,
    architecture: str,
    variant: str,
    *,
    guided: bool,
    ours: bool,
    estimates: bool = True,
) -> _Run:
    shapes = {name: canonical_shapes(one.part) for name, one in parts.items()}
    return _Run(architecture, variant, picture, guided, parts, shapes, estimates, ours, [])


def _found(run: _Run, between: Iterable[Stage]) -> Footprint:
    """All stages; `between` are those after the texts and before decoding."""
    if run.architecture in _VIDEO:
        run.notes.append("counted for one frame: activations grow with every frame of a video")
    stages = (*_encoders(run), *between, *_decoder(run))
    return Footprint(
        run.architecture, run.variant, run.picture, run.guided, stages, tuple(run.notes)
    )


def with_denoiser(found: Footprint, weights: PartWeights) -> Footprint:
    """The same picture made by a denoiser of other weights."""
    stages = tuple(
        replace(one, weights=weights) if one.name == "denoise" else one for one in found.stages
    )
    return replace(found, stages=stages)


def _encoders(run: _Run) -> Iterator[Stage]:
    """Text encoders at hand, then those the architecture runs with beside them."""
    picture = run.picture
    # the runtime encodes what is wanted and what is not one after the other
    batch = picture.batch * (2 if run.guided and not run.ours else 1)
    tokens = _text_tokens(run)
    wanted = companions_of(run.architecture, run.variant)
    if wanted is None:
        if run.architecture in ARCHITECTURES:
            run.notes.append(
                "which text encoder it runs with is not stated here: encoding is not estimated"
            )
        wanted = ()
    missing = [COMPANIONS[name] for name in wanted]
    for name, source in run.parts.items():
        if not name.startswith("text_encoder"):
            continue
        part = source.part
        known = next((one for one in missing if one.serves(part.kind)), None)
        if known is not None:
            missing.remove(known)
        weights = part_weights(source, compute=picture.compute)
        sizes = sizes_of(run.shapes[name], part.kind)
        moment = Moment("encoding", ())
        if sizes is not None:
            moment = encoder_moment(
                sizes, text_tokens=tokens, batch=batch, itemsize=run.itemsize(name), ours=run.ours
            )
        usual = known is not None and sizes is not None and known.width == sizes.width
        title = known.title if known and usual else _title(run, part)
        largest = largest_buffer((moment,))
        yield Stage("encode", name, title, True, "this file", weights, moment, largest)
    for one in missing if run.estimates else ():
        moment = encoder_moment(
            one.sizes, text_tokens=tokens, batch=batch, itemsize=picture.itemsize, ours=run.ours
        )
        largest = largest_buffer((moment,))
        weights = companion_weights(one)
        yield Stage("encode", one.name, one.title, False, one.source, weights, moment, largest)


def _title(run: _Run, part: PartMatch) -> str:
    """What a text encoder is called; with its size, where the file is nothing else."""
    title = TITLES.get(part.kind, part.kind)
    alone = part.kind == run.architecture and run.variant
    return f"{title} ({run.variant})" if alone else title


def _denoiser(run: _Run) -> Iterator[Stage]:
    part, row = run.part("denoiser"), ARCHITECTURES.get(run.architecture)
    if part is None:
        return
    moments = _walked(run, _denoiser_moments(run, part), "the denoiser")
    yield Stage(
        "denoise",
        part.name,
        row.title if row is not None else part.kind,
        True,
        "this file",
        part_weights(run.parts[part.name], compute=run.picture.compute),
        peak(moments),
        largest_buffer(moments),
    )


def _denoiser_moments(run: _Run, part: PartMatch) -> Iterator[Moment]:
    row = ARCHITECTURES.get(run.architecture)
    space = SPACES.get(row.space_for(run.variant)) if row is not None else None
    shapes, picture = run.shapes[part.name], run.picture
    if row is None or space is None:
        run.notes.append(
            "its latent space is not stated here: activations of the denoiser are not estimated"
        )
        return
    height, width = picture.over(space.downscale)
    latents = picture.batch * space.channels * height * width * _FLOAT32 * _LATENT_COPIES
    found: Iterator[Moment]
    if part.kind == "unet_ldm":
        joined = True
        samples = picture.batch * (2 if run.guided else 1)
        found = unet_moments(
            shapes,
            height=height,
            width=width,
            batch=samples,
            itemsize=run.itemsize("denoiser"),
            copied=picture.copied,
        )
    else:
        rule = row_for(part.kind, shapes, ours=run.ours)
        if rule is None:
            run.notes.append("its blocks are not known here: activations are not estimated")
            return
        if not rule.measured:
            run.notes.append(
                f"activations of {part.kind} follow a rule of thumb that was checked on others: "
                "from a tenth too low to 2.2 times too high"
            )
        joined = rule.joined
        samples = picture.batch * (2 if run.guided and joined else 1)
        patched = picture.over(space.downscale * row.latent.patch)
        found = transformer_moments(
            rule,
            shapes,
            image_tokens=patched[0] * patched[1],
            text_tokens=_text_tokens(run),
            batch=samples,
            itemsize=run.itemsize("denoiser"),
        )
    if run.guided:
        how = "as one batch" if joined else "one after the other"
        run.notes.append(f"classifier-free guidance: two predictions a step, {how}")
    for one in found:
        yield replace(one, buffers=(*one.buffers, Buffer("latents", latents, _LATENT_COPIES)))


def _walked(run: _Run, moments: Iterator[Moment], what: str) -> list[Moment]:
    """The moments of a walk; none, and a note, where a model lacks a layer that its kin have."""
    try:
        return list(moments)
    except (KeyError, IndexError) as error:
        told = f"{what} has no {str(error)[:80]} as its kin do: its activations are not estimated"
        if told not in run.notes:
            run.notes.append(told)
        return []


def _decoder(run: _Run) -> Iterator[Stage]:
    """The file's own autoencoder, or the one the architecture is published with."""
    row = ARCHITECTURES.get(run.architecture)
    space = SPACES.get(row.space_for(run.variant)) if row is not None else None
    part = run.part("vae")
    if part is not None and part.kind == "vae_tiny_encoder":
        run.notes.append("this file holds an encoder alone: it decodes nothing")
        return
    if part is None and not run.estimates:
        return
    if part is None and (space is None or not space.vae):
        if row is not None:
            of = f" of {space.title}" if space is not None else ""
            run.notes.append(f"the decoder{of} is not known here: decoding is not estimated")
        return
    compute = _decoder_dtype(run)
    if part is not None:
        kind, shapes = part.kind, run.shapes[part.name]
        weights = part_weights(run.parts["vae"], compute=compute)
        title, source = VAE_TITLES.get(kind, kind), "this file"
    else:
        assert space is not None
        usual = usual_vae(space.vae, space.channels)
        kind, shapes, weights = space.vae, usual.shapes, usual.weights
        title, source = f"autoencoder of {space.title}", space.source
    height, width = run.picture.over(downscale_of(shapes))
    each = STORAGE[compute].block_nbytes
    as_still = run.ours and kind == "vae_qwen"
    decode = still_moments if as_still else functools.partial(decode_moments, kind)
    walk = functools.partial(decode, shapes, itemsize=each, copied=run.picture.copied)
    moments = _walked(run, walk(height=height, width=width), title)
    tile = peak(_walked(run, walk(height=min(TILE, height), width=min(TILE, width)), title))
    canvas = 2 * _RGB * run.picture.height * run.picture.width * _FLOAT32
    yield Stage(
        "decode",
        "vae",
        title,
        part is not None,
        source,
        weights,
        peak(moments),
        largest_buffer(moments),
        replace(tile, buffers=(*tile.buffers, Buffer("picture and blending", canvas, 2))),
    )


def _picture_encoder(run: _Run) -> Iterator[Stage]:
    """The autoencoder that turns a given picture into latents."""
    part = run.part("vae")
    if part is None:
        return
    compute = _decoder_dtype(run)
    walk = encode_moments(
        part.kind,
        run.shapes["vae"],
        height=run.picture.height,
        width=run.picture.width,
        itemsize=STORAGE[compute].block_nbytes,
        copied=run.picture.copied,
    )
    title = VAE_TITLES.get(part.kind, part.kind)
    moments = _walked(run, walk, title)
    weights = part_weights(run.parts["vae"], compute=compute)
    largest = largest_buffer(moments)
    yield Stage("encode picture", "vae", title, True, "this file", weights, peak(moments), largest)


def _decoder_dtype(run: _Run) -> str:
    """The compute dtype; float32 where the autoencoder overflows float16."""
    row = ARCHITECTURES.get(run.architecture)
    fields = row.defaults("vae", run.variant) if row is not None else {}
    if run.compute("vae") == "F16" and fields.get("force_upcast"):
        run.notes.append("this autoencoder overflows float16: decoding is counted in float32")
        return "F32"
    return run.compute("vae")


_CLIP_TOKENS, _LONG_TOKENS = 77, 512


def _text_tokens(run: _Run) -> int:
    """Tokens of text per prompt; the most a model is given where that varies."""
    part = run.part("denoiser")
    if part is None:
        return _LONG_TOKENS
    rule = (
        None
        if part.kind == "unet_ldm"
        else row_for(part.kind, run.shapes[part.name], ours=run.ours)
    )
    if rule is None:
        return _CLIP_TOKENS
    return rule.variant_tokens.get(run.variant, rule.text_tokens)
