"""How `inspect` shows files: a page for one, a line each for many.

A page: what it is, what the header cannot tell, a tree of its parts, bars of its bytes by dtype.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import (
    DIM,
    TITLE,
    bar,
    billions,
    branches,
    clip,
    count,
    styled,
    width,
    wrap,
)
from diffquant.cli.view_loaders import render_loaders
from diffquant.cli.view_lora import render_inversion, render_lora
from diffquant.inspect.describe import FileReport
from diffquant.inspect.encodings import Encoding
from diffquant.inspect.many import Unreadable

__all__ = ["render_lines", "render_page"]

_KINDS = {
    "diffusion_model": "model",
    "text_encoder": "text encoder",
    "textual_inversion": "embedding",
    "clip_vision": "clip vision",
    "imatrix": "importance",
}
_CONTAINERS = {"diffusers_folder": "folder", "torch_pickle": "pickle", "sharded": "shards"}
_SHORT = {
    "denoiser": "model",
    "text_encoder": "te",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
}
_HEADERS = ("kind", "architecture", "stored as", "size", "weights", "container", "parts")
_NARROW_COLUMNS = 5
_WIDE = 110  # columns from which there is room for all of them
_METADATA_SHOWN = 40


def render_lines(reports: Sequence[FileReport | Unreadable]) -> None:
    """Print a line for each file, and what they come to."""
    place, names = _places([one.path for one in reports])
    rows = [[name, *_row(one)] for name, one in zip(names, reports, strict=True)]
    ending = _common_ending([row[0] for row in rows])
    headers = ["file" + (f" (*{ending})" if ending else ""), *_HEADERS]
    rows = [[row[0].removesuffix(ending), *row[1:]] for row in rows]
    wide = width() >= _WIDE
    columns = range(len(headers) if wide else _NARROW_COLUMNS)
    limits = {2: 26 if wide else 20, 3: 30 if wide else 16}
    widths = {i: max(len(row[i]) for row in (headers, *rows)) for i in columns}
    widths = {i: min(one, limits.get(i, one)) for i, one in widths.items()}
    others = sum(widths[i] + 2 for i in columns if i)
    widths[0] = max(min(widths[0], width() - others), 12)
    shown = [[clip(row[i], widths[i]) for i in columns] for row in (headers, *rows)]
    table(shown[0], shown[1:], right=(4, 5) if wide else (4,))
    styled((_total(reports) + (f" · in {place}" if place else ""), DIM))


def _places(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all paths share, and each path below it."""
    split = [path.replace(os.sep, "/").split("/") for path in paths]
    same = 0
    while all(len(one) > same + 1 and one[same] == split[0][same] for one in split):
        same += 1
    if not any(split[0][:same]):  # nothing but the root
        same = 0
    return "/".join(split[0][:same]), ["/".join(one[same:]) for one in split]


def _common_ending(names: Sequence[str]) -> str:
    """The extension that all names have: it is said once and leaves room for the names."""
    endings = {PurePath(name).suffix for name in names}
    found = endings.pop() if len(endings) == 1 else ""
    return found if found[1:].isalpha() else ""


def _row(one: FileReport | Unreadable) -> list[str]:
    if isinstance(one, Unreadable):
        return ["unreadable", "-", "-", "-", "-", "-", "-"]
    slug = "-" if one.kind == "imatrix" else f"{one.architecture} {one.variant}".strip()
    slug = slug.replace("_channels", "ch")
    return [
        _KINDS.get(one.kind, one.kind),
        slug,
        _stored(one),
        human(one.nbytes),
        billions(one.parameters),
        _CONTAINERS.get(one.container, one.container),
        _inside(one),
    ]


def _inside(one: FileReport) -> str:
    """Parts of a model; kinds and rank of an adapter."""
    if one.lora is None:
        return ", ".join(_SHORT.get(part.name, part.name) for part in one.parts)
    ranks = [rank for rank in one.lora.ranks if rank]
    told = list(one.lora.kinds)
    if ranks:
        told.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks")
    return ", ".join(told)


def _stored(report: FileReport) -> str:
    """The formats that most of the weights are stored in."""
    formats: dict[str, int] = {}
    for part in report.parts:
        for name, size in part.formats.items():
            formats[name] = formats.get(name, 0) + size
    if not formats:
        ranked = sorted(report.storage.items(), key=lambda row: -row[1].nbytes)
        return ", ".join(dtype.lower() for dtype, _ in ranked[:2]) or "-"
    total = sum(formats.values())
    ranked_formats = sorted(formats.items(), key=lambda row: -row[1])
    main = [name for name, size in ranked_formats if size * 20 > total]  # over a twentieth
    return ", ".join(main[:3]) or ranked_formats[0][0]


def _total(reports: Sequence[FileReport | Unreadable]) -> str:
    read = [one for one in reports if isinstance(one, FileReport)]
    told = [count(len(reports), "file"), human(sum(one.nbytes for one in read))]
    unknown = sum(one.architecture == "unknown" and one.kind != "imatrix" for one in read)
    if unknown:
        told.append(f"{unknown} of unknown architecture")
    if len(read) < len(reports):
        told.append(f"{len(reports) - len(read)} cannot be read")
    return " · ".join(told)


def render_page(report: FileReport, *, explain: bool = False) -> None:
    """Print all there is to say of one file."""
    styled((report.path, TITLE))
    if report.kind == "imatrix":
        echo(f"  importance matrix · {report.container}, {report.evidence[0]}")
        return
    name = f"{report.architecture} {report.variant}".strip()
    layout = f", {report.layout} layout" if report.layout and report.lora is None else ""
    styled(f"  {report.kind} · ", (name, TITLE), f" · {report.container}{layout}")
    title = f"{report.title}: " if report.title else ""
    echo(
        f"  {title}{count(report.tensors, 'tensor')}, {billions(report.parameters)} weights, "
        f"{human(report.nbytes)} ({report.nbytes / 1e9:.2f} GB)"
    )
    told = [line for line in report.evidence if " names: " not in line]  # said above, in short
    for line in told:
        for text in wrap(line):
            styled((text, DIM))
    if report.parts:
        echo()
        _parts(report)
    if report.storage:
        echo()
        _bytes(report)
    if report.encodings:
        echo()
        _encodings(report.encodings)
    if report.lora is not None or report.inversion is not None:
        echo()
    if report.lora is not None:
        render_lora(report.lora)
    elif report.inversion is not None:
        render_inversion(report.inversion)
    else:
        _nearest(report.candidates)
    if report.loaders:
        render_loaders(report.loaders)
    if explain:
        _explain(report)


def _parts(report: FileReport) -> None:
    lead = branches(len(report.parts))
    table(
        ("  part", "weights", "size", "stored as"),
        [
            (
                f"  {twig} {part.name}",
                billions(part.parameters),
                human(part.nbytes),
                _mix(part.formats, part.parameters),
            )
            for twig, part in zip(lead, report.parts, strict=True)
        ],
        right=(1, 2),
    )
    if report.leftovers:
        reasons = ", ".join(dict.fromkeys(report.leftovers.values()))
        for line in wrap(f"and {count(len(report.leftovers), 'tensor')} of no part: {reasons}"):
            echo(line)


def _bytes(report: FileReport) -> None:
    """Bytes by dtype, as bars."""
    ranked = sorted(report.storage.items(), key=lambda row: -row[1].nbytes)
    total = max(report.nbytes, 1)
    columns = min(40, width() - 46)
    names = max(len(dtype) for dtype, _ in ranked)
    for dtype, stored in ranked:
        share = stored.nbytes / total
        percent = f"{share:.1%}" if share >= 0.001 or not share else "<0.1%"
        styled(
            f"  {dtype.ljust(names)}  ",
            (bar(share, columns), {"fg": "cyan"}),
            f"  {human(stored.nbytes):>11}  {percent:>6}  {count(stored.tensors, 'tensor')}",
        )


def _encodings(encodings: Sequence[Encoding]) -> None:
    table(
        ("  packed as", "layers", "weights", "dialect", "said by", "scale"),
        [
            (
                f"  {row.format}" + ("" if row.readable else " (cannot be read)"),
                str(row.weights),
                billions(row.parameters),
                row.dialect,
                f"{row.marker}: {row.called or 'no format'}" if row.marker else "-",
                row.scale or "-",
            )
            for row in encodings
        ],
        right=(1, 2),
    )


def _nearest(candidates: Mapping[str, tuple[str, ...]]) -> None:
    if not candidates:
        return
    echo("  nearest known architectures:")
    for slug, missing in candidates.items():
        echo(f"    {slug}: lacks {', '.join(missing[:3])}")


def _explain(report: FileReport) -> None:
    echo()
    for line in report.evidence:
        echo(f"  evidence: {line}")
    if report.leftovers:
        echo(f"  {len(report.leftovers)} tensors belong to no part:")
        for key, reason in list(report.leftovers.items())[:8]:
            echo(f"    {key}: {reason}")
    for key, value in list(report.metadata.items())[:_METADATA_SHOWN]:
        echo(f"  {key} = {value}")
    more = len(report.metadata) - _METADATA_SHOWN
    if more > 0:
        echo(f"  and {more} more header entries (all of them with --json)")


def _mix(formats: Mapping[str, int], total: int) -> str:
    rows = sorted(formats.items(), key=lambda row: -row[1])
    return ", ".join(f"{name} {size / max(total, 1):.1%}" for name, size in rows[:4])
