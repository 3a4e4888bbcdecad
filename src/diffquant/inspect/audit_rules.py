"""What an audit is made of: rules as rows, findings as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

__all__ = ["Finding", "Found", "Rule", "Severity", "run_rules", "windows"]

Severity = Literal["violation", "warning"]
# (tensor or "", expected, found)
Found = tuple[str, str, str]
File = TypeVar("File")

_KEPT = 20  # findings kept per rule; the rest is counted
_SAMPLE_NBYTES = 1 << 16
_CHUNK_NBYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: the rule's name.
        severity: "violation" of a specification, or "warning": legal, and known to do harm.
        tensor: which tensor, "" for the file.
        expected, found: what the rule asks for and what is there.
        source: where the rule is written.
    """

    rule: str
    severity: Severity
    tensor: str
    expected: str
    found: str
    source: str


@dataclass(frozen=True, slots=True)
class Rule(Generic[File]):
    """One rule: `check` yields what breaks it."""

    name: str
    severity: Severity
    source: str
    check: Callable[[File], Iterator[Found]]


def run_rules(
    rules: Sequence[Rule[File]], file: File
) -> tuple[tuple[Finding, ...], dict[str, int]]:
    """Run every rule.

    Returns:
        findings, at most 20 a rule, violations first; and rule -> how many there were.
    """
    kept: list[Finding] = []
    counts: dict[str, int] = {}
    for rule in rules:
        for tensor, expected, found in rule.check(file):
            seen = counts.get(rule.name, 0)
            counts[rule.name] = seen + 1
            if seen < _KEPT:
                kept.append(Finding(rule.name, rule.severity, tensor, expected, found, rule.source))
    kept.sort(key=lambda one: one.severity != "violation")
    return tuple(kept), counts


def windows(nbytes: int, block_nbytes: int, *, full: bool) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks to look at: all of them, or 64 KiB at both ends and in the middle."""
    blocks = nbytes // block_nbytes
    step = max((_CHUNK_NBYTES if full else _SAMPLE_NBYTES) // block_nbytes, 1)
    if full or blocks <= 3 * step:
        spans = [(start, min(start + step, blocks)) for start in range(0, blocks, step)]
    else:
        middle = blocks // 2
        spans = [(0, step), (middle, middle + step), (blocks - step, blocks)]
    for start, stop in spans:
        yield start * block_nbytes, (stop - start) * block_nbytes
