"""The demo's page: one HTML file that needs nothing else, on a phone or a desk.

Pictures are PNG data URIs, the plot is inline SVG, style and script are inline, and a content
security policy forbids the rest. Every string may be hostile: the template escapes all of them, and
class names and ids come from indices, never from names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from diffquant.publish.grid import to_image
from diffquant.publish.plot import Plot, plot_of
from diffquant.publish.rows import DemoModel, DemoRow, decibel_text, number_text, size_text

__all__ = ["HEAT_FULL", "ModelPictures", "data_uri", "heat_map", "render_page"]

Picture = NDArray[np.float32]

HEAT_FULL = 0.25  # absolute difference, of [0, 1], that gets the brightest colour
_HEAT_STOPS = ((8, 8, 20), (62, 22, 110), (150, 40, 100), (226, 92, 48), (250, 180, 50), (255,) * 3)
# Verdict -> CSS class and sign: a verdict is never told by colour alone.
_VERDICTS = {"pass": ("good", "✓"), "warn": ("fair", "!"), "fail": ("bad", "✗")}


@dataclass(frozen=True, slots=True)
class ModelPictures:
    """What was generated, (H, W, 3) floats in [0, 1], one per prompt of the model.

    Attributes:
        reference: from the source.
        candidates: DemoRow.type -> pictures; types without pictures are left out.
    """

    reference: Sequence[Picture]
    candidates: Mapping[str, Sequence[Picture]]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A type's pictures, ready for the template: (prompt, candidate, heat map) per prompt."""

    row: DemoRow
    figures: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class _Section:
    """A model, ready for the template."""

    model: DemoModel
    plots: tuple[Plot, ...]  # for wide and for narrow screens
    reference: tuple[str, ...]
    shown: tuple[_Shown, ...]
    opened: int = 0  # whose pictures are open at first: the type furthest from the original


def render_page(
    models: Sequence[DemoModel], pictures: Mapping[str, ModelPictures], path: Path
) -> None:
    """Write the page.

    Args:
        models: in the order shown.
        pictures: DemoModel.name -> its pictures; models without pictures may be left out.
        path: target, overwritten.

    Raises:
        ValueError: a set of pictures has not one picture per prompt.
    """
    environment = Environment(
        loader=PackageLoader("diffquant.publish"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size_text, decibel=decibel_text, number=number_text, verdict=_verdict
    )
    script = _part(environment, "demo.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    verdicts = [row.verdict for model in models for row in model.rows]
    text = environment.get_template("demo.html.jinja").render(
        sections=[_section(model, pictures.get(model.name)) for model in models],
        counts=[(name, verdicts.count(name)) for name in dict.fromkeys(verdicts)],
        heat_full=HEAT_FULL,
        heat_gradient=", ".join("rgb({} {} {})".format(*stop) for stop in _HEAT_STOPS),
        style=_part(environment, "demo.css"),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    # A name may hold bytes that were no UTF-8 (lone surrogates): "?" rather than a crash.
    path.write_bytes(text.encode("utf-8", "replace"))


def heat_map(reference: Picture, candidate: Picture) -> Image.Image:
    """Draw the largest channel's absolute difference, brightness by its square root.

    What is not finite on either side is drawn as the largest difference.
    """
    difference = np.abs(reference - candidate).max(axis=2)
    difference = np.nan_to_num(difference, nan=HEAT_FULL, posinf=HEAT_FULL)
    levels = np.sqrt(np.clip(difference / HEAT_FULL, 0, 1))
    image = Image.fromarray(np.rint(levels * 255).astype(np.uint8)).convert("L")
    image.putpalette(_palette())
    return image


def data_uri(image: Image.Image) -> str:
    """Encode a picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _palette() -> bytes:
    stops = np.array(_HEAT_STOPS, np.float64)  # (6, 3)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8).tobytes()


def _section(model: DemoModel, pictures: ModelPictures | None) -> _Section:
    plots = tuple(p for p in (plot_of(model, 760, 330), plot_of(model, 340, 300)) if p is not None)
    if pictures is None:
        return _Section(model, plots, (), ())
    exact = _one_per_prompt(model, "the original", pictures.reference)
    shown = []
    for row in model.rows:
        if row.type not in pictures.candidates:
            continue
        others = _one_per_prompt(model, row.type, pictures.candidates[row.type])
        figures = tuple(
            (prompt, data_uri(to_image(other)), data_uri(heat_map(one, other)))
            for prompt, one, other in zip(model.prompts, exact, others, strict=True)
        )
        shown.append(_Shown(row, figures))
    reference = tuple(data_uri(to_image(picture)) for picture in exact)
    opened = min(range(len(shown)), key=lambda index: _closeness(shown[index].row), default=0)
    return _Section(model, plots, reference, tuple(shown), opened)


def _closeness(row: DemoRow) -> float:
    if row.identical or row.psnr_db is None:
        return math.inf
    return -math.inf if math.isnan(row.psnr_db) else row.psnr_db


def _one_per_prompt(model: DemoModel, what: str, pictures: Sequence[Picture]) -> Sequence[Picture]:
    if len(pictures) != len(model.prompts):
        raise ValueError(
            f"{model.name}: {what} has {len(pictures)} pictures for {len(model.prompts)} prompts"
        )
    return pictures


def _verdict(verdict: str) -> tuple[str, str]:
    return _VERDICTS.get(verdict, ("none", "–"))


def _part(environment: Environment, name: str) -> str:
    """Read our own style or script: trusted text that the template inserts as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
