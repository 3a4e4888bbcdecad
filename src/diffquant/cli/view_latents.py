"""Whether two files share a latent space, on a screen."""

from __future__ import annotations

from diffquant.cli.frame import echo
from diffquant.cli.screen import BAD, CARE, DIM, GOOD, TITLE, Tone, styled, wrap
from diffquant.convert.architectures.spaces import SPACES
from diffquant.inspect.latents import LatentReport, LatentSide

__all__ = ["render_latents"]

_WORDS: dict[str, tuple[str, Tone]] = {
    "same": ("the same latent space", GOOD),
    "different": ("different latent spaces", BAD),
    "wanted": ("the text encoder this model runs with", GOOD),
    "not wanted": ("not a text encoder this model runs with", BAD),
    "cannot tell": ("cannot tell", CARE),
    "not comparable": ("nothing to compare", CARE),
}


def render_latents(report: LatentReport) -> None:
    """Print the verdict on a pair, what it rests on, and what works instead."""
    styled((report.first.path, TITLE), " with ", (report.second.path, TITLE))
    styled("  ", _WORDS[report.verdict])
    for side in (report.first, report.second):
        for line in wrap(f"{side.title}{_space(side)}"):
            styled((line, DIM))
    for reason in report.reasons:
        for line in wrap(reason):
            echo(line)
    if report.instead:
        lead = "" if report.verdict == "cannot tell" else "instead: "
        for line in wrap(f"{lead}{report.instead}"):
            echo(line)


def _space(side: LatentSide) -> str:
    names = " or ".join(SPACES[key].title for key in side.spaces)
    return f": latents of {names}" if names else ""
