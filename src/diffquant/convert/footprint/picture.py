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
from dataclasses import replace

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import VAE_TITLES
from diffquant.convert.architectures.spaces import SPACES
from diffquant.convert.footprint.decode import Serving, usually
from diffquant.convert.footprint.moments import Buffer, Moment, largest_buffer, peak
from diffquant.convert.footprint.stages import Footprint, Picture, Run, Stage
from diffquant.convert.footprint.strips import strip_moments
from diffquant.convert.footprint.texts import text_stages, text_tokens
from diffquant.convert.footprint.transformer import row_for, transformer_moments
from diffquant.convert.footprint.unet import unet_moments
from diffquant.convert.footprint.vae import decode_moments, downscale_of
from diffquant.convert.footprint.vae_runtime import encode_moments, still_moments
from diffquant.convert.footprint.vae_usual import usual_vae
from diffquant.convert.footprint.weights import (
    PartSource,
    PartWeights,
    canonical_shapes,
    part_weights,
)
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match, PartMatch
from diffquant.core.dtypes import STORAGE

__all__ = ["footprint", "parts_footprint", "with_denoiser"]

_FLOAT32 = 4
_LATENT_COPIES = 3  # latents, prediction and the sampler's own, in float32
_VIDEO = ("wan", "hunyuan", "ltx")


def footprint(
    logical: LogicalSource,
    match: Match,
    picture: Picture,
    *,
    serving: Serving | None = None,
    ours: bool = False,
) -> Footprint:
    """Estimate what making a picture with a file takes.

    A file that holds one part alone, a VAE or a text encoder, has the stage of that part.

    Args:
        logical: the opened file.
        match: what it is.
        picture: what is to be made.
        serving: what decodes packed weights; a GPU with Triton where not given.
        ours: whether the runtime of this package runs it, else other programs as far as known.
    """
    row = ARCHITECTURES.get(match.architecture)
    serving = serving or usually("cuda")
    parts = {one.name: PartSource(logical, one, serving=serving) for one in match.parts}
    guided = row is not None and row.sampling_for(match.variant).cfg > 1
    run = _run(parts, picture, match.architecture, match.variant, guided=guided, ours=ours)
    return _found(run, _denoiser(run), tuple(_decoder(run)))


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
    last = tuple(_decoder(run))
    first = _picture_encoder(run, last) if from_picture else ()
    return _found(run, (*first, *_denoiser(run)), last)


def _run(
    parts: Mapping[str, PartSource],
    picture: Picture,
    architecture: str,
    variant: str,
    *,
    guided: bool,
    ours: bool,
    estimates: bool = True,
) -> Run:
    shapes = {name: canonical_shapes(one.part) for name, one in parts.items()}
    return Run(architecture, variant, picture, guided, parts, shapes, estimates, ours, [])


def _found(run: Run, between: Iterable[Stage], last: Iterable[Stage]) -> Footprint:
    """All stages; `between` are those after the texts and before decoding, the last."""
    if run.architecture in _VIDEO:
        run.notes.append("counted for one frame: activations grow with every frame of a video")
    stages = (*text_stages(run), *between, *last)
    return Footprint(
        run.architecture, run.variant, run.picture, run.guided, stages, tuple(run.notes)
    )


def with_denoiser(found: Footprint, weights: PartWeights) -> Footprint:
    """The same picture made by a denoiser of other weights."""
    stages = tuple(
        replace(one, weights=weights) if one.name == "denoise" else one for one in found.stages
    )
    return replace(found, stages=stages)


def _denoiser(run: Run) -> Iterator[Stage]:
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


def _denoiser_moments(run: Run, part: PartMatch) -> Iterator[Moment]:
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
            text_tokens=text_tokens(run),
            batch=samples,
            itemsize=run.itemsize("denoiser"),
        )
    if run.guided:
        how = "as one batch" if joined else "one after the other"
        run.notes.append(f"classifier-free guidance: two predictions a step, {how}")
    for one in found:
        yield replace(one, buffers=(*one.buffers, Buffer("latents", latents, _LATENT_COPIES)))


def _walked(run: Run, moments: Iterator[Moment], what: str) -> list[Moment]:
    """The moments of a walk; none, and a note, where a model lacks a layer that its kin have."""
    try:
        return list(moments)
    except (KeyError, IndexError) as error:
        told = f"{what} has no {str(error)[:80]} as its kin do: its activations are not estimated"
        if told not in run.notes:
            run.notes.append(told)
        return []


def _decoder(run: Run) -> Iterator[Stage]:
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
    cut = functools.partial(strip_moments, kind, shapes, height=height, width=width, itemsize=each)
    strips, host = (
        peak(_walked(run, cut(copied=run.picture.copied, host=away), title))
        for away in (False, True)
    )
    yield Stage(
        "decode",
        "vae",
        title,
        part is not None,
        source,
        weights,
        peak(moments),
        largest_buffer(moments),
        strips,
        host,
    )


def _picture_encoder(run: Run, decoding: tuple[Stage, ...]) -> Iterator[Stage]:
    """The autoencoder that turns a given picture into latents.

    In strips its maps are those of decoding at half the channels: what decoding takes is enough.
    """
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
    stage = Stage(
        "encode picture",
        "vae",
        title,
        True,
        "this file",
        part_weights(run.parts["vae"], compute=compute),
        peak(moments),
        largest_buffer(moments),
    )
    for one in decoding:
        stage = replace(stage, tiled=one.tiled, host=one.host)
    yield stage


def _decoder_dtype(run: Run) -> str:
    """The compute dtype; float32 where the autoencoder overflows float16."""
    row = ARCHITECTURES.get(run.architecture)
    fields = row.defaults("vae", run.variant) if row is not None else {}
    if run.compute("vae") == "F16" and fields.get("force_upcast"):
        run.notes.append("this autoencoder overflows float16: decoding is counted in float32")
        return "F32"
    return run.compute("vae")
