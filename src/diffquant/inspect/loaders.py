"""loader_report(): which programs can load a file, on what condition, and why not.

A verdict is the worst of the rows that apply (loader_rules/). A program accepts nothing that no row
says it accepts: where nothing is known, the verdict is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import UnknownFormat
from diffquant.inspect.loader_rules import (
    LOADER_RULES,
    LOADERS,
    VERDICTS,
    Case,
    LoaderRule,
    Verdict,
)
from diffquant.inspect.subject import Subject, open_subject
from diffquant.io.imatrix import is_legacy_imatrix
from diffquant.io.locations import is_remote, locate

__all__ = [
    "LOADERS",
    "LoaderVerdict",
    "Reason",
    "check_loader",
    "judge",
    "loader_report",
    "matrix_report",
]


@dataclass(frozen=True, slots=True)
class Reason:
    """One row that applies to a file.

    Attributes:
        rule: id of the row.
        verdict: what it alone says.
        text: what was found, what happens, what to do.
        source: where it is written.
    """

    rule: str
    verdict: Verdict
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class LoaderVerdict:
    """What one program does with one file; `reasons` begin with what decided."""

    loader: str
    verdict: Verdict
    reasons: tuple[Reason, ...]


def check_loader(name: str) -> None:
    """Check a loader's name.

    Raises:
        UnknownFormat: with the known names and the closest.
    """
    if name not in LOADERS:
        raise UnknownFormat(name, LOADERS, what="loader")


def judge(path: str | Path) -> tuple[LoaderVerdict, ...]:
    """Open a file and judge it; an importance matrix of any kind is judged too.

    Raises:
        CheckpointError: it cannot be read.
    """
    place = locate(path)
    if not is_remote(place) and place.is_file() and is_legacy_imatrix(place):
        return matrix_report()
    with open_subject(path) as subject:
        return loader_report(subject)


def matrix_report() -> tuple[LoaderVerdict, ...]:
    """What programs do with an importance matrix in llama.cpp's older container: nothing."""
    rows = {rule.loader: rule for rule in LOADER_RULES if rule.kinds == {"imatrix"}}
    return tuple(_verdict(name, [_reason(rows[name], "")]) for name in LOADERS)


def loader_report(
    subject: Subject, rules: Sequence[LoaderRule] = LOADER_RULES
) -> tuple[LoaderVerdict, ...]:
    """Judge a file by every row: one verdict per program, in the order of LOADERS."""
    case = Case(subject)
    found: dict[str, list[Reason]] = {name: [] for name in LOADERS}
    for rule in rules:
        particular = rule.finds(case)
        if particular is not None:
            found[rule.loader].append(_reason(rule, particular))
    return tuple(_verdict(name, reasons) for name, reasons in found.items())


def _reason(rule: LoaderRule, particular: str) -> Reason:
    text = f"{particular}: {rule.text}" if particular else rule.text
    return Reason(rule.id, rule.verdict, text, rule.source)


def _verdict(name: str, reasons: list[Reason]) -> LoaderVerdict:
    rank = {verdict: place for place, verdict in enumerate(VERDICTS)}
    reasons = sorted(reasons, key=lambda one: -rank[one.verdict])
    verdict: Verdict = reasons[0].verdict if reasons else "unknown"
    known = any(one.verdict == "accepts" for one in reasons)
    if verdict == "caveat" and not known:
        verdict = "unknown"
    return LoaderVerdict(name, verdict, tuple(reasons))
