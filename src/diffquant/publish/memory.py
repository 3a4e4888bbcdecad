"""The card's memory column: what a picture takes with a file, and which parts that counts.

A whole model counts its own parts, a denoiser those that it lacks in 16 bits, a text encoder or a
VAE is at work alone: three numbers that do not compare. Where a release has more than one of them,
each row says which it is, and a part alone is never said to fit a card.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffquant.inspect.fit import FitReport
from diffquant.publish.facts import FileFacts
from diffquant.publish.rows import size_text

__all__ = ["cards", "memory_cell", "memory_notes"]

WHOLE, LACKS, PART = "whole model", "other parts in 16 bits", "this part alone"
_GIB = 1 << 30
_CARDS_GIB = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)  # what graphics cards have
_LEVELS = (("none", "whole"), ("model", "a part at a time"), ("blocks", "streamed by blocks"))


def memory_cell(fit: FitReport, several: Sequence[FitReport]) -> str:
    """What a picture takes; with what is counted, where `several` files count differently."""
    if fit.reason or not fit.levels:
        return "-"
    whole, least = fit.levels[0].nbytes, fit.levels[-1].nbytes
    told = f"{size_text(whole)}, at the least {size_text(least)}"
    kinds = {_counted(one) for one in several if one.levels}
    return f"{told} ({_counted(fit)})" if len(kinds) > 1 else told


def cards(fit: FitReport) -> list[str]:
    """The smallest card for each way of running; none for a part alone."""
    if not fit.levels or _counted(fit) == PART:
        return []
    levels = {level.level: level.nbytes for level in reversed(fit.levels)}
    told = []
    smaller: float = float("inf")
    for level, words in _LEVELS:
        card = next((c for c in _CARDS_GIB if levels.get(level, 1 << 62) <= c * _GIB), None)
        if card is not None and card < smaller:
            told.append(f"{card} GiB card {words}")
            smaller = card
    return told


def memory_notes(facts: Sequence[FileFacts]) -> list[str]:
    """What the column assumes, by what its rows count."""
    known = [one.fit for one in facts if one.fit.levels]
    kinds = [kind for kind in (WHOLE, LACKS, PART) if kind in map(_counted, known)]
    notes = []
    for kind in kinds:
        fits = [one for one in known if _counted(one) == kind]
        sizes = " or ".join(dict.fromkeys(f"{one.width} x {one.height}" for one in fits))
        whose = f" ({kind})" if len(kinds) > 1 else ""
        if kind == PART:
            notes.append(
                f"Memory{whose} is an estimate for the part at work, no other part on the card."
            )
            continue
        told = (
            f"Memory{whose} is an estimate for one picture of {sizes} in bfloat16: first with "
            "every part on the card, then with as much as possible streamed."
        )
        if kind == LACKS:
            lacking = dict.fromkeys(s.title for one in fits for s in one.stages if not s.in_file)
            told += f" It counts, in 16 bits, what a file lacks: {', '.join(lacking)}."
        notes.append(told)
    notes += [
        f"{one.path.name}: no estimate, {one.fit.reason}" for one in facts if not one.fit.levels
    ]
    return notes


def _counted(fit: FitReport) -> str:
    """Which parts the numbers of a file count."""
    if not any(one.name == "denoise" for one in fit.stages):
        return PART
    return WHOLE if all(one.in_file for one in fit.stages) else LACKS
