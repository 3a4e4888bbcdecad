"""Stages of encoding text: by the encoders at hand, and those an architecture runs with."""

from __future__ import annotations

from collections.abc import Iterator

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import TITLES
from diffquant.convert.footprint.companions import COMPANIONS, companions_of
from diffquant.convert.footprint.encoders import encoder_moment, sizes_of
from diffquant.convert.footprint.moments import Moment, largest_buffer
from diffquant.convert.footprint.stages import Run, Stage
from diffquant.convert.footprint.transformer import row_for
from diffquant.convert.footprint.weights import companion_weights, part_weights
from diffquant.convert.match import PartMatch

__all__ = ["text_stages", "text_tokens"]

_CLIP_TOKENS, _LONG_TOKENS = 77, 512


def text_stages(run: Run) -> Iterator[Stage]:
    """Text encoders at hand, then those the architecture runs with beside them."""
    picture = run.picture
    # the runtime encodes what is wanted and what is not one after the other
    batch = picture.batch * (2 if run.guided and not run.ours else 1)
    tokens = text_tokens(run)
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


def _title(run: Run, part: PartMatch) -> str:
    """What a text encoder is called; with its size, where the file is nothing else."""
    title = TITLES.get(part.kind, part.kind)
    alone = part.kind == run.architecture and run.variant
    return f"{title} ({run.variant})" if alone else title


def text_tokens(run: Run) -> int:
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
