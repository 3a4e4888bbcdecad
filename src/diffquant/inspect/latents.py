"""latents(): do two files share a latent space, and what works where they do not.

A picture half made by one model can be handed to another only as latents of the same space: same
encoder, same scaling. Otherwise it goes through pixels: decode with the first one's autoencoder,
resize, encode with the second's. An autoencoder or a text encoder is also told whether it is the
one a denoiser was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import TITLES
from diffquant.convert.architectures.spaces import SPACES, LatentSpace
from diffquant.convert.footprint.companions import COMPANIONS, companions_of
from diffquant.convert.match import Match, PartMatch
from diffquant.inspect.subject import Subject

__all__ = ["LatentReport", "LatentSide", "Verdict", "latents"]

Verdict = Literal["same", "different", "cannot tell", "wanted", "not wanted", "not comparable"]

_CLOSE = 1e-4  # between two spellings of one scaling factor


@dataclass(frozen=True, slots=True)
class LatentSide:
    """One of the two files.

    Attributes:
        role: denoiser, vae, text_encoder, or the file's kind where it is none of these.
        title: what it is, in a few words.
        spaces: keys of SPACES it may belong to; one where it is certain, none where unknown.
        why: what that rests on.
    """

    path: str
    role: str
    title: str
    spaces: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class LatentReport:
    """The verdict on a pair.

    Attributes:
        verdict: of two denoisers or autoencoders: same, different or cannot tell; of a text
            encoder and a denoiser: wanted, not wanted or cannot tell; else not comparable.
        reasons: what differs, or what agrees.
        instead: what works where the verdict is no.
    """

    first: LatentSide
    second: LatentSide
    verdict: Verdict
    reasons: tuple[str, ...]
    instead: str


def latents(first: Subject, second: Subject) -> LatentReport:
    """Compare two opened files."""
    a, b = _side(first), _side(second)
    roles = (a.role, b.role)
    if "text_encoder" in roles and "denoiser" in roles:
        encoder, model = (first, second) if a.role == "text_encoder" else (second, first)
        return _text_encoder(a, b, encoder, model)
    if not {*roles} <= {"denoiser", "vae"}:
        odd = next(one for one in (a, b) if one.role not in ("denoiser", "vae"))
        reason = f"{odd.path} is {_article(odd.role)}, which has no latents"
        return LatentReport(a, b, "not comparable", (reason,), "")
    return _spaces(a, b)


def _article(role: str) -> str:
    if role == "unknown":
        return "of no known kind"
    return f"a {'LoRA' if role == 'lora' else role.replace('_', ' ')}"


def _side(subject: Subject) -> LatentSide:
    match = subject.match
    if match is not None and match.architecture in ARCHITECTURES:
        return _denoiser(subject.path, match)
    if match is not None and match.parts and match.parts[0].name == "vae":
        return _autoencoder(subject.path, match.parts[0])
    if match is not None and match.architecture in TITLES:
        title = TITLES[match.architecture] + (f" {match.variant}" if match.variant else "")
        return LatentSide(subject.path, "text_encoder", title, (), "")
    return LatentSide(subject.path, subject.kind, subject.kind.replace("_", " "), (), "")


def _denoiser(path: str, match: Match) -> LatentSide:
    row = ARCHITECTURES[match.architecture]
    title = f"{row.title} {match.variant}".strip()
    space = row.space_for(match.variant)
    if not space:
        why = "works on pixels, or its latents are not stated here"
        return LatentSide(path, "denoiser", title, (), why)
    return LatentSide(path, "denoiser", title, (space,), f"{row.title} is trained on it")


def _autoencoder(path: str, part: PartMatch) -> LatentSide:
    """The spaces an autoencoder may decode: by kind, channels, and a config's scale and shift.

    Tiny ones work on latents as they are scaled already, and have no scale of their own
    (madebyollin/taesd@5cccb12:taesd.py).
    """
    tiny = part.kind.startswith("vae_tiny")
    channels = _number(part, "latent_channels", "z_dim")
    named = [
        key
        for key, row in SPACES.items()
        if row.channels == channels and (bool(row.tiny) if tiny else row.vae == part.kind)
    ]
    title = f"{'tiny ' if tiny else ''}autoencoder of {channels:g} channels" if channels else "VAE"
    why = f"{channels:g} latent channels" if channels else "no count of latent channels"
    scale = None if tiny else _number(part, "scaling_factor")
    if scale is not None and len(named) > 1:
        shift = _number(part, "shift_factor") or 0.0
        exact = [key for key in named if _scaled(SPACES[key], scale, shift)]
        if exact:
            return LatentSide(path, "vae", title, tuple(exact), f"{why}, its config's {scale:g}")
    if len(named) > 1:
        why += "; names and shapes do not tell these spaces apart"
    return LatentSide(path, "vae", title, tuple(named), why)


def _number(part: PartMatch, *names: str) -> float | None:
    for name in names:
        hyper = part.hyper.get(name)
        if hyper is not None and isinstance(hyper.value, int | float):
            return float(hyper.value)
    return None


def _scaled(space: LatentSpace, scale: float, shift: float) -> bool:
    if space.scaling_factor is None:
        return False
    return (
        abs(space.scaling_factor - scale) < _CLOSE
        and abs((space.shift_factor or 0.0) - shift) < _CLOSE
    )


def _spaces(a: LatentSide, b: LatentSide) -> LatentReport:
    for one in (a, b):
        if not one.spaces:
            reason = f"{one.path}: {one.why or 'its latent space is not known here'}"
            return LatentReport(a, b, "cannot tell", (reason,), _PIXELS)
    shared = [key for key in a.spaces if key in b.spaces]
    if not shared:
        return LatentReport(a, b, "different", _differences(a, b), _instead(a, b))
    if len(a.spaces) == len(b.spaces) == 1:
        title = SPACES[shared[0]].title
        reasons = (f"both work on the latents of {title}: {SPACES[shared[0]].scaling}",)
        return LatentReport(a, b, "same", reasons, "")
    vague = a if len(a.spaces) > 1 else b
    names = " or ".join(SPACES[key].title for key in vague.spaces)
    reasons = (f"{vague.path} may be of {names}: {vague.why}",)
    return LatentReport(a, b, "cannot tell", reasons, "a config.json beside it would tell")


_PIXELS = (
    "pixels work between any two: decode with the first one's autoencoder, resize, encode with the "
    "second one's"
)


def _instead(a: LatentSide, b: LatentSide) -> str:
    if a.role == b.role == "denoiser":
        return _PIXELS
    model = a if a.role == "denoiser" else b
    if model.role != "denoiser":
        return ""
    return f"use an autoencoder of {SPACES[model.spaces[0]].title}"


def _differences(a: LatentSide, b: LatentSide) -> tuple[str, ...]:
    """What keeps two spaces apart, the coarsest first."""
    one, two = SPACES[a.spaces[0]], SPACES[b.spaces[0]]
    found = []
    if one.channels != two.channels:
        found.append(f"{one.channels} latent channels against {two.channels}")
    if one.downscale != two.downscale:
        found.append(f"{one.downscale} pixels per latent against {two.downscale}")
    certain = len(a.spaces) == len(b.spaces) == 1
    if certain and one.scaling != two.scaling:
        found.append(f"{one.title}: {one.scaling}; {two.title}: {two.scaling}")
    if one.channels == two.channels:
        found.append("equal channels, but another encoder made them: the numbers mean other things")
    return tuple(found)


def _text_encoder(a: LatentSide, b: LatentSide, encoder: Subject, model: Subject) -> LatentReport:
    """Whether a text encoder is one that a model runs with."""
    held, match = encoder.match, model.match
    assert held is not None
    assert match is not None
    names = companions_of(match.architecture, match.variant)
    title = ARCHITECTURES[match.architecture].title
    if names is None:
        reason = f"which text encoder {title} runs with is not stated here"
        return LatentReport(a, b, "cannot tell", (reason,), "")
    rows = [COMPANIONS[name] for name in names]
    told = f"{title} runs with {', '.join(row.title for row in rows) or 'none of its own'}"
    for row in rows:
        if row.serves(held.architecture) and row.variant in ("", held.variant):
            return LatentReport(a, b, "wanted", (told,), "")
    return LatentReport(a, b, "not wanted", (told, "this one is another"), "")
