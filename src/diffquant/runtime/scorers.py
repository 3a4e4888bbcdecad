"""Draw the demo prompts' pictures, and judge whether a picture shows what its prompt asked for.

The demo pipelines in ``examples/`` speak one small language::

    a {size} {colour} {shape} on a {background} background {place}
    a small red circle on a blue background at the left

Each sentence has exactly one right picture, so a generated picture can be judged without any
other model: `render` draws the right one (the training data), `score` answers five questions
about any picture. This file needs numpy only and imports nothing of this package, because the
training scripts load it by its path on machines where the package is not installed.

Sources: none; the grammar and the judge were made for this project.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DEMO_PROMPTS",
    "PLACES",
    "SHAPES",
    "SIDE",
    "SIZES",
    "PromptScore",
    "Scene",
    "all_scenes",
    "parse",
    "psnr_db",
    "random_prompts",
    "render",
    "score",
]

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIDE = 128  # pictures are SIDE x SIDE

# Far apart in RGB (0.42 at least between any two), so that noise or blur cannot turn one name
# into another.
COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.86, 0.10, 0.12),
        "green": (0.10, 0.60, 0.20),
        "blue": (0.10, 0.25, 0.85),
        "yellow": (0.98, 0.90, 0.18),
        "purple": (0.55, 0.15, 0.62),
        "orange": (0.96, 0.50, 0.05),
        "white": (0.96, 0.96, 0.96),
        "black": (0.04, 0.04, 0.04),
    }
)
BACKGROUNDS = tuple(COLOURS)
SIZES: Mapping[str, float] = MappingProxyType({"small": 14.0, "large": 26.0})  # radius, pixels
PLACES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {  # centre (x, y), pixels
        "at the left": (36.0, 64.0),
        "at the right": (92.0, 64.0),
        "at the top": (64.0, 36.0),
        "at the bottom": (64.0, 92.0),
        "in the center": (64.0, 64.0),
    }
)


def _regular(corners: int, radius: float, inner: float | None = None) -> Floats:
    """Corners of a regular polygon, or of a star when `inner` is its inner radius; top first."""
    count = corners if inner is None else 2 * corners
    angle = 2 * np.pi * np.arange(count) / count
    reach = np.full(count, radius)
    if inner is not None:
        reach[1::2] = inner
    return np.stack([reach * np.sin(angle), -reach * np.cos(angle)], 1).astype(np.float32)


def _cross(reach: float, arm: float) -> Floats:
    quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
    turns = [quarter, [(-y, x) for x, y in quarter]]
    corners = turns[0] + turns[1] + [(-x, -y) for x, y in turns[0] + turns[1]]
    return np.array(corners, np.float32)


# Corners at radius 1, centred on the shape's own centroid so that a mask's mean is its place.
# None is the circle.
SHAPES: Mapping[str, Floats | None] = MappingProxyType(
    {
        "circle": None,
        "square": np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], np.float32),
        "triangle": _regular(3, 1.25),
        "star": _regular(5, 1.25, 0.52),
        "cross": _cross(1.05, 0.36),
    }
)

DEMO_PROMPTS = (
    "a small red circle on a blue background at the left",
    "a large yellow star on a black background in the center",
    "a large green square on a white background at the right",
    "a small white triangle on a purple background at the top",
    "a large orange cross on a blue background at the bottom",
    "a small black star on an orange background at the right",
    "a large purple circle on a yellow background at the top",
    "a small blue cross on a green background in the center",
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a prompt asks for, one word (or phrase) per attribute."""

    shape: str
    colour: str
    size: str
    background: str
    place: str

    @property
    def prompt(self) -> str:
        """The scene as a sentence of the grammar."""
        article = "an" if self.background[0] in "aeiou" else "a"
        return (
            f"a {self.size} {self.colour} {self.shape} on {article} {self.background} background "
            f"{self.place}"
        )


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Five answers about one picture.

    Attributes:
        background: share of the pixels around the object that have the asked colour, 0 to 1.
        colour: share of the object's inner pixels that have the asked colour, 0 to 1.
        place: the object's centroid is nearest to the asked place.
        size: the object's area is nearer to the asked size than to any other.
        shape: of all shapes drawn there with the same area, the asked one overlaps best.
    """

    background: float
    colour: float
    place: bool
    size: bool
    shape: bool

    @property
    def total(self) -> float:
        """One number: both colour shares multiplied, halved for each wrong place, size, shape."""
        wrong = 3 - (self.place + self.size + self.shape)
        return float(self.background * self.colour * 0.5**wrong)


_SENTENCE = re.compile(
    r"an? (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) on an? (?P<background>\w+) background "
    r"(?P<place>\w+ the \w+)"
)


def parse(prompt: str) -> Scene:
    """Read a prompt of the grammar; case, spacing and a final full stop do not matter.

    Raises:
        ValueError: the sentence has another form, a word is unknown, or the object has the
            colour of its background.
    """
    found = _SENTENCE.fullmatch(" ".join(prompt.lower().split()).rstrip(" ."))
    if found is None:
        raise ValueError(
            f"prompt {prompt!r} is outside the demo grammar; expected "
            "'a SIZE COLOUR SHAPE on a COLOUR background PLACE', such as "
            f"{DEMO_PROMPTS[0]!r}"
        )
    words = found.groupdict()
    known: dict[str, tuple[str, ...]] = {
        "size": tuple(SIZES),
        "colour": tuple(COLOURS),
        "shape": tuple(SHAPES),
        "background": BACKGROUNDS,
        "place": tuple(PLACES),
    }
    for attribute, names in known.items():
        if words[attribute] not in names:
            raise ValueError(
                f"unknown {attribute} {words[attribute]!r} in prompt {prompt!r}; "
                f"known: {', '.join(names)}"
            )
    if words["colour"] == words["background"]:
        raise ValueError(f"object and background are both {words['colour']} in prompt {prompt!r}")
    return Scene(**words)


def all_scenes() -> tuple[Scene, ...]:
    """Every scene the grammar can say, in a fixed order."""
    every = product(SHAPES, COLOURS, SIZES, BACKGROUNDS, PLACES)
    return tuple(Scene(*words) for words in every if words[1] != words[3])


def random_prompts(n: int, seed: int) -> list[str]:
    """Draw `n` prompts (different ones while the grammar has that many), repeatable by `seed`."""
    scenes = all_scenes()
    rng = np.random.default_rng(seed)
    order = [int(i) for _ in range(0, max(n, 1), len(scenes)) for i in rng.permutation(len(scenes))]
    return [scenes[i].prompt for i in order[:n]]


def render(prompt: str | Scene) -> Floats:
    """Draw the one right picture of a prompt.

    Returns:
        (128, 128, 3) float32 in [0, 1]; edges are antialiased over one pixel.
    """
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    cover = _scene_coverage(scene.shape, scene.place, scene.size)[..., None]
    ink, paper = (np.array(COLOURS[c], np.float32) for c in (scene.colour, scene.background))
    return np.asarray(cover * ink + (1 - cover) * paper, np.float32)


def psnr_db(image: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal to noise ratio of two pictures (float in [0, 1] or uint8), in dB."""
    error = _to_float(image).astype(np.float64) - _to_float(reference)
    mse = float(np.mean(error**2))
    return float("inf") if mse == 0 else -10 * float(np.log10(mse))


def score(image: NDArray[Any], prompt: str | Scene) -> PromptScore:
    """Judge whether a picture shows what the prompt asks for.

    Args:
        image: (H, H, 3) or (H, H, 4), uint8 or float in [0, 1]; any H, resized to 128 first.
        prompt: a sentence of the grammar, or its scene.

    Raises:
        ValueError: the picture is not a square colour picture, or not finite, or the prompt is
            outside the grammar.
    """
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    pixels = _smooth(_resize(_to_float(image)))
    names = _nearest_names(pixels)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    mask = _object_mask(pixels, np.median(border, axis=0))
    # One pixel of antialiasing and one of smoothing belong to neither side: leave both out.
    inside, outside = _shrink(mask, 2), ~_grow(mask, 2)
    background = _share(names[outside] == list(COLOURS).index(scene.background), SIDE)
    area = int(mask.sum())
    if area < _MIN_AREA:
        return PromptScore(background, 0.0, False, False, False)
    colour = _share(names[inside] == list(COLOURS).index(scene.colour), 9)
    rows, columns = np.nonzero(mask)
    centre = (float(columns.mean()), float(rows.mean()))
    distance = {p: np.hypot(centre[0] - x, centre[1] - y) for p, (x, y) in PLACES.items()}
    place = min(distance, key=lambda p: float(distance[p])) == scene.place
    shape, overlap = _best_shape(mask, centre)
    radius = np.sqrt(area / _unit_area(shape))
    size = min(SIZES, key=lambda s: abs(float(np.log(radius / SIZES[s])))) == scene.size
    # A blob that resembles nothing has neither shape nor size, however large its area is.
    clear = overlap >= _MIN_OVERLAP
    return PromptScore(background, colour, place, size and clear, clear and shape == scene.shape)


_MIN_AREA = 60  # pixels; a third of the smallest object the grammar can ask for
_MIN_OVERLAP = 0.6  # intersection over union; true shapes reach 0.94, noise stays below 0.45
_NAME_RADIUS = 0.25  # a pixel farther than this from every named colour has no name
_ROUND_UP = 0.97  # shares from here on count as 1: a few stray pixels are not an error


@cache  # 50 masks serve all 2800 scenes
def _scene_coverage(shape: str, place: str, size: str) -> Floats:
    return _coverage(shape, PLACES[place], SIZES[size])


def _coverage(shape: str, centre: tuple[float, float], radius: float) -> Floats:
    """Share of each pixel that the shape covers, from the signed distance to its outline."""
    axis = np.arange(SIDE, dtype=np.float32)
    x = (axis[None, :] - np.float32(centre[0])) / np.float32(radius)
    y = (axis[:, None] - np.float32(centre[1])) / np.float32(radius)
    corners = SHAPES[shape]
    distance = np.sqrt(x * x + y * y) - 1 if corners is None else _polygon_distance(x, y, corners)
    return np.asarray(np.clip(0.5 - distance * radius, 0, 1), np.float32)


def _polygon_distance(x: Floats, y: Floats, corners: Floats) -> Floats:
    """Signed distance to a polygon's outline, negative inside (even-odd rule)."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


@cache
def _unit_area(shape: str) -> float:
    """Area of the shape at radius 1."""
    corners = SHAPES[shape]
    if corners is None:
        return float(np.pi)
    x, y = corners[:, 0], corners[:, 1]
    return 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))


def _best_shape(mask: Mask, centre: tuple[float, float]) -> tuple[str, float]:
    """The shape that overlaps the mask best when drawn at its place with its area."""
    overlaps = {}
    for shape in SHAPES:
        drawn = _coverage(shape, centre, float(np.sqrt(mask.sum() / _unit_area(shape)))) > 0.5
        overlaps[shape] = float((drawn & mask).sum() / max(int((drawn | mask).sum()), 1))
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best, overlaps[best]


def _object_mask(pixels: Floats, paper: NDArray[Any]) -> Mask:
    """Pixels that are more than half object, whatever the object's colour is."""
    difference = pixels - paper.astype(np.float32)
    far = np.linalg.norm(difference, axis=-1) > _NAME_RADIUS
    if far.sum() < _MIN_AREA // 2:
        return np.zeros(far.shape, bool)
    ink = np.median(difference[far], axis=0)
    along = difference @ ink / max(float(ink @ ink), 1e-6)
    return np.asarray((along > 0.5) | (far & (along < -0.5)), bool)


def _nearest_names(pixels: Floats) -> NDArray[np.intp]:
    """Index into COLOURS of each pixel's name, -1 where no name is near."""
    palette = np.array(list(COLOURS.values()), np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    return np.where(distance.min(-1) <= _NAME_RADIUS, distance.argmin(-1), -1)


def _share(hits: Mask, at_least: int) -> float:
    """Share of true entries; of fewer than `at_least` pixels nothing can be said, so 0."""
    if hits.size < at_least:
        return 0.0
    share = float(hits.mean())
    return 1.0 if share >= _ROUND_UP else share


def _to_float(image: NDArray[Any]) -> Floats:
    picture = np.asarray(image)
    if (
        picture.ndim != 3
        or picture.shape[2] not in (3, 4)
        or not 0 < picture.shape[0] == picture.shape[1]
    ):
        raise ValueError(f"expected a square colour picture (H, H, 3), found {picture.shape}")
    scale = 255.0 if picture.dtype == np.uint8 else 1.0
    floats = picture[..., :3].astype(np.float32) / np.float32(scale)
    if not np.isfinite(floats).all():
        raise ValueError("the picture holds values that are not finite")
    return np.asarray(np.clip(floats, 0, 1), np.float32)


def _resize(picture: Floats) -> Floats:
    """Resize to SIDE: box mean where the side is a multiple of it, else bilinear."""
    side = picture.shape[0]
    if side % SIDE == 0:
        factor = side // SIDE
        boxes = picture.reshape(SIDE, factor, SIDE, factor, 3)
        return np.asarray(boxes.mean((1, 3)), np.float32)
    at = np.clip((np.arange(SIDE) + 0.5) * side / SIDE - 0.5, 0, side - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, side - 1), (at - low).astype(np.float32)
    rows = picture[low] * (1 - part)[:, None, None] + picture[high] * part[:, None, None]
    mixed = rows[:, low] * (1 - part)[None, :, None] + rows[:, high] * part[None, :, None]
    return np.asarray(mixed, np.float32)


def _windows(values: NDArray[Any]) -> list[NDArray[Any]]:
    """The nine 3 x 3 neighbours of every pixel, edges repeated."""
    padded = np.pad(values, [(1, 1), (1, 1)] + [(0, 0)] * (values.ndim - 2), mode="edge")
    h, w = values.shape[:2]
    return [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]


def _smooth(picture: Floats) -> Floats:
    return np.asarray(np.mean(_windows(picture), axis=0), np.float32)


def _shrink(mask: Mask, times: int) -> Mask:
    for _ in range(times):
        mask = np.logical_and.reduce(_windows(mask))
    return mask


def _grow(mask: Mask, times: int) -> Mask:
    return ~_shrink(~mask, times)
