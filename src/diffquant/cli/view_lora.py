"""Render a LoraReport or an InversionReport: what a person asks of such a file, in that order."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping

from diffquant.cli.frame import echo
from diffquant.inspect.inversion import InversionReport
from diffquant.inspect.lora import LoraReport

__all__ = ["render_inversion", "render_lora"]

_INDENT = 2
_LABEL = 12
_TAGS = 8
_LISTED = 8
_NAME_LIMIT = 120
_MANY = 3  # different ranks or alphas that are listed one by one


def render_lora(report: LoraReport) -> None:
    """Print what an adapter file is."""
    for label, text in _lora_rows(report):
        _row(label, text)
    for name, why in report.malformed[:_LISTED]:
        _row("malformed", f"{name:.{_NAME_LIMIT}}: {why}")
    _more(len(report.malformed))
    for name in report.zero[:_LISTED]:
        _row("zero", name[:_NAME_LIMIT])
    _more(len(report.zero))


def render_inversion(report: InversionReport) -> None:
    """Print what a textual inversion is."""
    _row("for", _base(report.base, "", report.also, {}))
    origin = "" if report.trigger_from == "key" else f" (by its {report.trigger_from})"
    _row("trigger", f"{report.trigger}{origin}")
    for one in report.tokens:
        encoder = one.encoder or "no known encoder"
        _row("vectors", f"{one.vectors} of width {one.width}, {encoder}")
    if report.trained_on or report.steps:
        steps = f"{report.steps} steps" if report.steps else ""
        _row("trained", ", ".join(filter(None, (report.trained_on, steps))))


def _lora_rows(report: LoraReport) -> Iterator[tuple[str, str]]:
    yield "for", _base(report.base, report.variant, report.also, report.candidates)
    yield "adapters", ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    spelled = {"original": "original module names", "diffusers": "Diffusers module names"}
    names = (report.naming_title, spelled.get(report.spelling, ""))
    yield "names", ", ".join(filter(None, names))
    if report.ranks:
        yield "rank", _rank(report.ranks)
        yield "alpha", _alpha(report)
    for part in report.parts:
        title = f"{part.name or 'unknown part'}{f' ({part.model})' if part.model else ''}"
        families = ", ".join(
            f"{count} {name.replace('_', '-')}" for name, count in part.families.items()
        )
        yield "part", f"{title}: {part.layers} layers ({families})"
    if report.blocks:
        yield "blocks", "; ".join(_blocks(report))
    if report.triggers:
        yield "trigger", ", ".join(report.triggers)
    if report.training.tags:
        tags = list(report.training.tags.items())[:_TAGS]
        yield "tags", ", ".join(f"{tag} {count}" for tag, count in tags)
    if report.training.note:
        yield "tags", report.training.note
    if trained := ", ".join(_training(report)):
        yield "trained", trained
    if report.vectors:
        yield "vectors", f"{', '.join(report.vectors)}: token vectors that belong to it"
    if report.hint is not None:
        hint = report.hint
        yield "hint", f"its name says {hint.title}: {hint.advice} ({hint.source})"


def _base(
    slug: str, variant: str, also: tuple[str, ...], candidates: Mapping[str, tuple[str, ...]]
) -> str:
    name = " ".join(filter(None, (slug, variant)))
    if also:
        return f"{name} ({' and '.join(also)} would fit as well)"
    if slug == "unknown" and candidates:
        near = "; ".join(f"{one} {', '.join(why)}" for one, why in candidates.items())
        return f"unknown; nearest: {near}"
    return name


def _rank(ranks: Mapping[str, int]) -> str:
    named = {int(rank): count for rank, count in ranks.items() if rank}
    bare = ranks.get("", 0)
    if not named:
        return "none: this kind has no rank"
    if len(named) == 1:
        text = f"{next(iter(named))}"
    elif len(named) <= _MANY:
        text = ", ".join(f"{rank} ({count} layers)" for rank, count in named.items())
    else:
        common = max(named, key=lambda rank: named[rank])
        text = f"{min(named)} to {max(named)}, mostly {common}"
    return f"{text}; {bare} layers without one" if bare else text


def _alpha(report: LoraReport) -> str:
    stated = {alpha: count for alpha, count in report.alphas.items() if alpha}
    missing = report.alphas.get("", 0)
    if not stated:
        return "not stated: taken to be the rank, scale 1"
    if len(stated) <= _MANY:
        text = ", ".join(stated)
    else:
        values = sorted(map(float, stated))
        text = f"{values[0]:g} to {values[-1]:g}"
    scale = f"scale {report.scale:g}" if report.scale is not None else ""
    rooted = "over the root of the rank" if report.rank_stabilised else ""
    missed = f"not stated for {missing} layers" if missing else ""
    return ", ".join(filter(None, (text, scale, rooted, missed)))


def _blocks(report: LoraReport) -> Iterator[str]:
    for one in report.blocks:
        if one.total == 1:
            yield one.stack
        elif one.total is None:
            yield f"{one.stack} {one.touched}"
        elif one.count == one.total:
            yield f"{one.stack} all {one.total}"
        else:
            yield f"{one.stack} {one.touched} ({one.count} of {one.total})"


def _training(report: LoraReport) -> Iterator[str]:
    training = report.training
    if training.base_model:
        yield f"on {training.base_model}"
    named = {
        "steps": training.steps,
        "epochs": training.epochs,
        "images": training.images,
        "resolution": training.resolution,
        "optimizer": training.optimizer.rsplit(".", 1)[-1].split("(")[0],
        "learning rate": training.learning_rate,
    }
    yield from (f"{name} {value}" for name, value in named.items() if value)
    if training.network:
        yield training.network


def _row(label: str, text: str) -> None:
    """A label, and text that wraps beside it."""
    width = max(shutil.get_terminal_size().columns, 40)
    lead = " " * _INDENT + label.ljust(_LABEL)
    lines = textwrap.wrap(
        text,
        width - 1,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_on_hyphens=False,
        break_long_words=False,  # names are there to be copied
    )
    echo("\n".join(lines) if lines else lead.rstrip())


def _more(count: int) -> None:
    if count > _LISTED:
        _row("", f"and {count - _LISTED} more")
