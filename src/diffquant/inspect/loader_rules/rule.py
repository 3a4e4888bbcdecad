"""LoaderRule: one thing that a program does with a file, as a row.

A row applies to a file of its kinds, containers and architectures on which `when` finds something.
What `when` returns is the particular (which tensors, which name) and stands before the row's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffquant.inspect.loader_rules.case import Case

__all__ = ["FILES", "MODELS", "VERDICTS", "LoaderRule", "Verdict", "always"]

Verdict = Literal["accepts", "caveat", "unknown", "refuses"]
VERDICTS: tuple[Verdict, ...] = ("accepts", "caveat", "unknown", "refuses")  # mildest first

MODELS = frozenset({"checkpoint", "diffusion_model"})
FILES = frozenset({"safetensors", "pickle"})


def always(_case: Case) -> str | None:
    """Apply to every file of the row's kinds, containers and architectures."""
    return ""


@dataclass(frozen=True, slots=True)
class LoaderRule:
    """One row.

    Attributes:
        id: loader, a dot, and the rule's own name.
        verdict: "accepts" (and how), "caveat": accepts on a condition, "refuses": stops, or loads
            other numbers than the file holds; "unknown": nobody has said.
        text: what happens, and what to do.
        source: where it is written: repository@commit:path, or what was run.
        kinds, containers, architectures: what the row is about; empty for any.
        when: case -> what was found, "" for nothing to name, None where the row does not apply.
    """

    id: str
    verdict: Verdict
    text: str
    source: str
    kinds: frozenset[str] = frozenset()
    containers: frozenset[str] = frozenset()
    architectures: frozenset[str] = frozenset()
    when: Callable[[Case], str | None] = always

    @property
    def loader(self) -> str:
        """Which program it is about."""
        return self.id.partition(".")[0]

    def finds(self, case: Case) -> str | None:
        """What the row finds on a file, None where it does not apply."""
        for value, allowed in (
            (case.kind, self.kinds),
            (case.container, self.containers),
            (case.architecture, self.architectures),
        ):
            if allowed and value not in allowed:
                return None
        return self.when(case)
