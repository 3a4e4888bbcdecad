"""A diagnosis on a screen: facts as a name and a value, models in a table, then problems."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import BAD, CARE, DIM, GOOD, TITLE, Tone, count, styled, width, wrap
from diffquant.cli.view_bench import render_bench
from diffquant.runtime.doctor.families import TYPES_SHOWN, FamilyFit, TypeFit
from diffquant.runtime.doctor.machine import Disk, Memory
from diffquant.runtime.doctor.processor import Processor
from diffquant.runtime.doctor.report import Diagnosis

__all__ = ["render_doctor"]

_NAME_COLUMNS = 12
_FEW = 3  # formats that are named without being asked for
_WORDS = {
    "none": "every part stays",
    "model": "one part at a time",
    "blocks": "blocks streamed",
    "sequential": "layers streamed",
    "strips": "the picture is decoded in strips",
    "host": "and through host memory",
}


def render_doctor(found: Diagnosis, *, explain: bool = False) -> None:
    """Print a diagnosis; `explain` names every format and what decides each model."""
    _machine(found)
    echo()
    _devices(found)
    echo()
    _libraries(found)
    echo()
    _decoders(found, explain=explain)
    echo()
    if found.products:
        _products(found)
        echo()
    if found.bench is not None:
        render_bench(found.bench)
    _models(found, explain=explain)
    echo()
    _problems(found)


def _title(text: str) -> None:
    for line in wrap(text, ""):
        styled((line, TITLE))


def _fact(name: str, value: str, tone: Tone | None = None) -> None:
    """A name and what is said of it, wrapped beside it."""
    room = max(width() - _NAME_COLUMNS - 4, 20)
    lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
    for index, line in enumerate(lines):
        head = f"  {name if index == 0 else '':{_NAME_COLUMNS}}  "
        styled(head, (line, tone or {}))


def _machine(found: Diagnosis) -> None:
    here = found.machine
    _title("Machine")
    _fact("system", f"{here.system}, Python {here.python}, diffquant {here.diffquant}")
    if here.processor is not None:
        _fact("processor", _processor(here.processor))
        told = here.processor.instructions
        _fact("instructions", "unknown" if told is None else ", ".join(told) or "none of note")
    _fact("memory", "unknown" if here.memory is None else _memory(here.memory))
    for disk in here.disks:
        _fact("disk", _disk(disk))


def _processor(one: Processor) -> str:
    cores = f"{count(one.cores, 'core')}, " if one.cores is not None else ""
    told = f"{one.name}, {cores}{count(one.threads, 'thread')}"
    return f"{told}, {one.usable:g} usable ({one.limited_by})" if one.limited_by else told


def _memory(one: Memory) -> str:
    limit = f", limited to {human(one.limit)} by a control group" if one.limit is not None else ""
    swap = f"{human(one.swap_free)} of {human(one.swap)} swap free" if one.swap else "no swap"
    return f"{human(one.available)} of {human(one.total)} available{limit}, {swap}"


def _disk(one: Disk) -> str:
    if one.free is None or one.total is None:
        return f"{one.what} {one.path} does not exist yet"
    return f"{human(one.free)} of {human(one.total)} free for the {one.what} ({one.path})"


def _devices(found: Diagnosis) -> None:
    cards = found.accelerators
    _title("Devices, and what --dtype auto computes in")
    dtypes = {one.device: f"{one.dtype}: {one.why}" for one in found.compute}
    _fact("cpu", dtypes.get("cpu", "torch does not load: nothing is computed"))
    for one in cards.found:
        memory = ""
        if one.memory is not None and one.free is not None:
            memory = f", {human(one.free)} of {human(one.memory)} free"
        _fact(one.device, f"{one.name}{memory}, {dtypes.get(one.device, 'dtype unknown')}")
    for row in found.compute:
        if row.device != "cpu" and row.device not in {one.device for one in cards.found}:
            _fact(row.device, dtypes[row.device])
    if cards.driver:
        _fact("driver", f"NVIDIA {cards.driver}")
    for kind, why in cards.why_none.items():
        _fact(f"no {kind}", why, DIM)


def _libraries(found: Diagnosis) -> None:
    _title("Libraries")
    there = [f"{one.name} {one.version}" for one in found.libraries if one.version]
    built = f", torch for {found.accelerators.built_for}" if found.accelerators.built_for else ""
    _fact("installed", ", ".join(there) + built)
    for one in found.libraries:
        if one.error:
            _fact("broken", f"{one.name} {one.version}: {one.error}", BAD)
    for one in found.libraries:
        if not one.version:
            _fact("missing", f"{one.name}, would add {one.adds} ({one.install})", DIM)


def _decoders(found: Diagnosis, *, explain: bool) -> None:
    _title("Packed weights are decoded by")
    if not found.decoders:
        _fact("unknown", "torch does not load")
    for row in found.decoders:
        if row.backend == "stored" and not explain:
            continue  # nothing to decode
        names = f": {', '.join(row.formats)}" if explain or len(row.formats) <= _FEW else ""
        told = f"{row.backend} to {row.dtype}, {count(len(row.formats), 'format')}{names}"
        _fact(row.device, f"{told} ({row.reason})")


def _products(found: Diagnosis) -> None:
    _title("Products in 8 bits (generate --compute)")
    for row in found.products:
        engine = f"{row.engine}, {row.reason}" if row.engine else f"no: {row.reason}"
        _fact(row.device, f"{row.kind}: {engine}")


def _models(found: Diagnosis, *, explain: bool) -> None:
    plan = found.planned
    _title("Published models at native size: rung of memory, predicted peak")
    if plan.budget is None:
        budget = "whose memory is not known"
    else:
        whose = "RAM" if plan.device == "cpu" else "device memory"
        budget = f"in {human(plan.budget)} of {whose}"
    supposed = ", as supposed" if plan.supposed else ""
    for line in wrap(f"on {plan.device}, computing in {plan.dtype}, {budget}{supposed}"):
        styled((line, DIM))
    head = ("  model", *TYPES_SHOWN)
    rows = [(f"  {_name(one)}", *(_cell(fit) for fit in one.types)) for one in found.families]
    columns = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if explain or sum(columns) + 2 * len(head) - 2 > width():
        _list(found.families, explain=explain)
    else:
        table(head, rows)
    fits = [fit for one in found.families for fit in one.types]
    used = {word for fit in fits if fit.fits is not False for word in (fit.level, fit.decoder)}
    legend = "; ".join(f"{word}: {told}" for word, told in _WORDS.items() if word in used)
    for line in wrap(legend):
        styled((line, DIM))
    _limits(found.families)


def _name(one: FamilyFit) -> str:
    return f"{one.title} {one.width}" + (f"x{one.height}" if one.height != one.width else "")


def _cell(fit: TypeFit) -> str:
    rung = "needs" if fit.fits is False else fit.rung
    return f"{rung} {fit.peak_nbytes / (1 << 30):.1f} GiB"


def _list(rows: Iterable[FamilyFit], *, explain: bool) -> None:
    for one in rows:
        styled("  ", (_name(one), TITLE), ", guided" if one.guided else "")
        for fit in one.types:
            tone = {True: GOOD, False: BAD, None: {}}[fit.fits]
            styled(f"    {fit.type:8}", (_cell(fit), tone))
            told = f"decided by {fit.stage}: {fit.decides}; denoiser {human(fit.denoiser_nbytes)}"
            kept = fit.resident.get("denoiser")
            told += f", {count(kept, 'block')} of it stay" if kept else ""
            for line in wrap(told, " " * 12) if explain else ():
                styled((line, DIM))


def _limits(rows: Iterable[FamilyFit]) -> None:
    """What decides the peak of the smallest type, and for which models."""
    groups: dict[str, list[str]] = {}
    for one in rows:
        fit = one.types[-1]
        what = {"decode": "decoding the picture", "encode": f"the text encoder ({fit.decides})"}
        groups.setdefault(what.get(fit.stage, "a step of the denoiser"), []).append(one.title)
    told = "; ".join(f"{what}: {', '.join(titles)}" for what, titles in groups.items())
    for line in wrap(f"what decides at {TYPES_SHOWN[-1]}: {told}"):
        styled((line, DIM))


def _problems(found: Diagnosis) -> None:
    if not found.problems:
        styled(("No problems found", GOOD))
        return
    _title("Problems")
    for one in found.problems:
        _marked("!", one.what, CARE)
        _marked(">", one.do, DIM)


def _marked(mark: str, text: str, tone: Tone) -> None:
    """A text whose first line has a mark in front."""
    first, *rest = wrap(text, "    ")
    styled(("  " + mark, tone), " " + first.strip())
    for line in rest:
        echo(line)
