"""The page of a comparison: one HTML file that needs nothing else, on a phone or a desk.

Pictures are WebP data URIs, each of them there once; charts are inline SVG, style and script are
inline, and a content security policy forbids the rest. Every string may be hostile: the templates
escape all of them, and class names and ids come from indices, never from names. Without JavaScript
the table, the charts and all pictures are there; the script adds the picture slider, choices,
sorting and read-outs. Bytes depend on the arguments only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffquant.core.shown import CONTROL
from diffquant.io.atomic import PartialFile, check_parent
from diffquant.publish.embedding import HEAT_FULL, HEAT_GRADIENT, PICTURE_LIMIT
from diffquant.publish.meanings import COLUMN_MEANINGS, meanings_of
from diffquant.publish.page_sections import section_of
from diffquant.publish.page_table import VERDICTS
from diffquant.publish.rows import number_text, size_text
from diffquant.runtime.comparison import METRICS, Comparison, ComparisonPictures

__all__ = ["render_comparison", "render_comparisons"]

_CONTROL = {code: text for code, text in CONTROL.items() if chr(code) not in "\n\r\t"}  # prompts


def render_comparison(
    comparison: Comparison,
    pictures: ComparisonPictures,
    path: Path,
    *,
    title: str | None = None,
    picture_limit: int = PICTURE_LIMIT,
) -> None:
    """Write the page of one comparison.

    Args:
        comparison: rows as they are shown.
        pictures: of the reference and of any of the rows; without rows none are shown.
        path: target, replaced when it is whole.
        title: heading; default: what the reference is called.
        picture_limit: characters of data URIs that are embedded at most.

    Raises:
        ValueError: pictures that are not one per prompt and seed, or an unknown metric.
        UsageError: the target's folder does not exist.
    """
    heading = title or f"{comparison.reference}: quantized files compared"
    render_comparisons(((comparison, pictures),), path, title=heading, picture_limit=picture_limit)


def render_comparisons(
    several: Sequence[tuple[Comparison, ComparisonPictures]],
    path: Path,
    *,
    title: str,
    picture_limit: int = PICTURE_LIMIT,
) -> None:
    """Write one page of several comparisons, each with an equal share of `picture_limit`."""
    environment = Environment(
        loader=PackageLoader("diffquant.publish"),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size_text, number=number_text, verdict=_verdict)
    script = _part(environment, "page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    share = picture_limit // max(1, len(several))
    sections = [section_of(one, drawn, picture_limit=share) for one, drawn in several]
    verdicts = [row.verdict for one, _ in several for row in one.candidates]
    metrics = tuple(name for name in METRICS if any(name in one.metrics for one, _ in several))
    text = environment.get_template("page.html.jinja").render(
        title=title,
        titles={name: metric.title for name, metric in METRICS.items()},
        sections=sections,
        counts=[(name, verdicts.count(name)) for name in dict.fromkeys(verdicts)],
        meanings=meanings_of(metrics),
        columns=COLUMN_MEANINGS,
        heat_full=HEAT_FULL,
        heat_gradient=HEAT_GRADIENT,
        style=_part(environment, "page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    raw = text.encode("utf-8")
    check_parent(path)
    file = PartialFile(path, len(raw))
    try:
        file.write(0, memoryview(raw))
        file.commit()
    finally:
        file.abort()


def _verdict(verdict: str) -> tuple[str, str, str]:
    return VERDICTS.get(verdict, ("none", "–", verdict or "not judged"))


def _plain(value: object) -> object:
    """A template's value; control characters, which also turn lines around, stand as escapes.

    So do lone surrogates, of names that were no UTF-8: they cannot be encoded.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.translate(_CONTROL)
    return value


def _part(environment: Environment, name: str) -> str:
    """Read our own style or script: trusted text that the template inserts as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
