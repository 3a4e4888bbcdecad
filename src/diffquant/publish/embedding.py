"""Pictures inside a page: lossless WebP data URIs, heat maps of differences, and a size limit.

Pictures are embedded pair by pair (a prompt and a seed), the reference first, then every row with
its heat map, until the limit is reached. What comes after is left out, and `Embedded.left_out` says
what that is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffquant.core.errors import shorten
from diffquant.publish.grid import to_image
from diffquant.runtime.comparison import Comparison, ComparisonPictures

__all__ = [
    "HEAT_FULL",
    "HEAT_GRADIENT",
    "PICTURE_LIMIT",
    "Embedded",
    "Shot",
    "data_uri",
    "embed",
    "heat_map",
    "pair_labels",
]

Picture = NDArray[np.float32]

PICTURE_LIMIT = 24 << 20  # characters of data URIs in one page: what a phone still opens
HEAT_FULL = 0.25  # absolute difference, of [0, 1], that gets the brightest colour
_HEAT_STOPS = ((8, 8, 20), (62, 22, 110), (150, 40, 100), (226, 92, 48), (250, 180, 50), (255,) * 3)
HEAT_GRADIENT = ", ".join("rgb({} {} {})".format(*stop) for stop in _HEAT_STOPS)


@dataclass(frozen=True, slots=True)
class Shot:
    """What a row drew for a pair: data URIs of the picture and of its difference ("" for none)."""

    picture: str
    heat: str = ""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Pictures of one comparison.

    Attributes:
        pairs: pair index -> (row name -> Shot); the reference is the row None.
        count, total: pictures embedded, and drawn; heat maps are not counted.
        left_out: which pairs or rows are missing for the limit, "" for none.
        nbytes: characters of all data URIs.
    """

    pairs: Mapping[int, Mapping[str | None, Shot]]
    count: int
    total: int
    left_out: str
    nbytes: int


def embed(
    comparison: Comparison, pictures: ComparisonPictures, *, limit: int = PICTURE_LIMIT
) -> Embedded:
    """Encode pictures until `limit` characters are reached.

    Raises:
        ValueError: a set of pictures has not one picture per prompt and seed, pictures of unlike
            shapes, or pictures of a row that the comparison does not have.
    """
    names = [row.name for row in comparison.rows if row.name in pictures.rows]
    labels = pair_labels(comparison)
    _check(comparison, pictures, len(labels))
    found: dict[int, dict[str | None, Shot]] = {}
    lost: dict[int, list[str]] = {}
    used, count = 0, 0
    for index, name in _order(len(labels), names):
        shot = None if lost else _shot(pictures, index, name)
        cost = 0 if shot is None else len(shot.picture) + len(shot.heat)
        if shot is None or used + cost > limit:
            lost.setdefault(index, []).append("the reference" if name is None else name)
            continue
        used, count = used + cost, count + 1
        found.setdefault(index, {})[name] = shot
    return Embedded(found, count, len(labels) * (1 + len(names)), _told(lost, found, labels), used)


def pair_labels(comparison: Comparison) -> tuple[str, ...]:
    """One label a pair, prompts outermost: the prompt, and the seed where there are several."""
    return tuple(
        prompt if len(comparison.seeds) == 1 else f"{prompt}, seed {seed}"
        for prompt in comparison.prompts
        for seed in comparison.seeds
    )


def _order(pairs: int, names: Sequence[str]) -> Iterator[tuple[int, str | None]]:
    for index in range(pairs):
        yield index, None
        for name in names:
            yield index, name


def _shot(pictures: ComparisonPictures, index: int, name: str | None) -> Shot:
    exact = pictures.reference[index]
    if name is None:
        return Shot(data_uri(to_image(exact)))
    other = pictures.rows[name][index]
    return Shot(data_uri(to_image(other)), data_uri(heat_map(exact, other)))


def _told(
    lost: Mapping[int, Sequence[str]], found: Mapping[int, object], labels: Sequence[str]
) -> str:
    """Say what is left out: rows of the pair that was cut, and the pairs after it."""
    parts = [f"of “{labels[index]}” {shorten(lost[index])}" for index in lost if index in found]
    whole = [f"“{labels[index]}”" for index in lost if index not in found]
    if whole:
        parts.append(f"all of {shorten(whole)}")
    return "; ".join(parts)


def _check(comparison: Comparison, pictures: ComparisonPictures, pairs: int) -> None:
    known = {row.name for row in comparison.rows}
    sets = {"the reference": pictures.reference, **pictures.rows}
    for name, drawn in sets.items():
        where = f"{comparison.reference}: {name}"
        if name != "the reference" and name not in known:
            raise ValueError(f"{where} has pictures and no row")
        if len(drawn) != pairs:
            raise ValueError(f"{where} has {len(drawn)} pictures for {pairs} prompts and seeds")
        for picture, exact in zip(drawn, pictures.reference, strict=False):
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape != exact.shape:
                raise ValueError(
                    f"{where} has a picture of shape {picture.shape} beside {exact.shape}, "
                    "expected (H, W, 3) on both sides"
                )


def heat_map(reference: Picture, candidate: Picture) -> Image.Image:
    """Draw the largest channel's absolute difference, brightness by its square root.

    What is not finite on either side is drawn as the largest difference.
    """
    with np.errstate(invalid="ignore"):
        difference = np.abs(reference - candidate).max(axis=2)
    difference = np.nan_to_num(difference, nan=HEAT_FULL, posinf=HEAT_FULL)
    levels = np.sqrt(np.clip(difference / HEAT_FULL, 0, 1))
    image = Image.fromarray(np.rint(levels * 255).astype(np.uint8)).convert("L")
    image.putpalette(_palette())
    return image


def data_uri(image: Image.Image) -> str:
    """Encode a picture as a lossless WebP data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=True, quality=60, method=4, exact=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _palette() -> bytes:
    stops = np.array(_HEAT_STOPS, np.float64)  # (6, 3)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8).tobytes()
