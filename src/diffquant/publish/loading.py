"""How to load a release in each program: only programs that read it, with their conditions.

Verdicts are inspect's (inspect/loader_rules), one per program and file. Files that a program takes
in the same way share an entry; refusals are named with their first reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

from diffquant.inspect.loaders import LOADERS, LoaderVerdict
from diffquant.publish.release import Published

__all__ = ["Loading", "loading_of"]

_PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "comfyui": "ComfyUI",
        "comfyui-gguf": "ComfyUI with ComfyUI-GGUF",
        "forge": "Forge",
        "diffusers": "diffusers",
        "sdcpp": "stable-diffusion.cpp",
        "diffquant": "diffquant",
    }
)
_DIFFUSION, _WHOLE = "--diffusion-model", "--model"


@dataclass(frozen=True, slots=True)
class Loading:
    """A program and some files.

    Attributes:
        program: for people.
        files: names.
        how: where a file goes and how it is chosen.
        example: a command or code, "" for none; its language beside it.
        conditions: what to look out for.
        refused: why it cannot read them; "" where it can.
    """

    program: str
    files: tuple[str, ...]
    how: tuple[str, ...] = ()
    example: str = ""
    language: str = ""
    conditions: tuple[str, ...] = ()
    refused: str = ""


def loading_of(files: Sequence[Published]) -> tuple[tuple[Loading, ...], tuple[Loading, ...]]:
    """Entries of programs that read the files, and of those that do not, in LOADERS' order."""
    reads: list[Loading] = []
    refuses: list[Loading] = []
    for loader in LOADERS:
        groups: dict[tuple[object, ...], list[Published]] = {}
        for one in files:
            verdict = next((v for v in one.facts.loaders if v.loader == loader), None)
            if verdict is None or verdict.verdict == "unknown":
                continue
            groups.setdefault(_alike(verdict), []).append(one)
        for (readable, *_), members in groups.items():
            verdict = next(v for v in members[0].facts.loaders if v.loader == loader)
            (reads if readable else refuses).append(_entry(loader, verdict, members))
    return tuple(reads), tuple(refuses)


def _alike(verdict: LoaderVerdict) -> tuple[object, ...]:
    return (verdict.verdict != "refuses", *(one.rule for one in verdict.reasons))


def _entry(loader: str, verdict: LoaderVerdict, members: Sequence[Published]) -> Loading:
    names = tuple(one.place for one in members)
    program = _PROGRAMS.get(loader, loader)
    if verdict.verdict == "refuses":
        return Loading(program, names, refused=verdict.reasons[0].text)
    example, language = _example(loader, members[0])
    return Loading(
        program=program,
        files=names,
        how=tuple(one.text for one in verdict.reasons if one.verdict == "accepts"),
        example=example,
        language=language,
        conditions=tuple(one.text for one in verdict.reasons if one.verdict == "caveat"),
    )


def _example(loader: str, one: Published) -> tuple[str, str]:
    """A line to start from, for programs that are called by one."""
    name = shlex.quote(PurePosixPath(one.place).name)
    whole = one.facts.report.kind == "checkpoint"
    if one.facts.report.kind not in ("checkpoint", "diffusion_model"):
        return "", ""
    if loader == "sdcpp":
        return f'sd-cli {_WHOLE if whole else _DIFFUSION} {name} -p "a red fox"', "sh"
    if loader == "diffquant":
        base = "" if whole else " --base ORIGINAL"
        return f'diffquant generate {name}{base} -p "a red fox" -o fox.png', "sh"
    return "", ""
