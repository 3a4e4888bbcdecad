"""Which files of a repository are meant, and where they go; names from a server are hostile."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffquant.core.errors import MalformedFile, UsageError, closest, shorten
from diffquant.io.quant_label import quant_label
from diffquant.io.remote_path import RemoteEntry
from diffquant.io.sharded import plain_name

__all__ = ["local_name", "select"]

_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f<>\"|?*]")


def select(
    listing: Mapping[str, RemoteEntry],
    *,
    below: str = "",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    quant: str = "",
) -> tuple[RemoteEntry, ...]:
    """Choose files.

    Args:
        listing: all there are.
        below: a file, or a folder whose files alone count.
        include: patterns, of which one must fit; `*` crosses slashes, as `hf download` has it.
        exclude: patterns, of which none may fit.
        quant: a label that the name must have; see quant_label.

    Raises:
        UsageError: nothing is left; the message says what there is.
    """
    inside = [
        entry
        for path, entry in sorted(listing.items())
        if not below or path == below or path.startswith(f"{below}/")
    ]
    if not inside:
        near = closest(below, listing)
        hint = f", did you mean {near!r}?" if near else f" (it has {shorten(listing)})"
        raise UsageError(f"no file or folder {below!r} in the repository{hint}")
    include, exclude = tuple(include), tuple(exclude)
    found = [
        entry
        for entry in inside
        if (not include or _any_fits(entry.path, include)) and not _any_fits(entry.path, exclude)
    ]
    if quant:
        labels = {entry.path: quant_label(entry.path) for entry in found}
        found = [entry for entry in found if labels[entry.path] == quant.upper()]
        if not found:
            known = sorted({label for label in labels.values() if label})
            raise UsageError(
                f"no file is labelled {quant.upper()} (labels: {shorten(known, 30) or 'none'})"
            )
    if not found:
        raise UsageError(
            f"no file is left by --include and --exclude (of {len(inside)}: "
            f"{shorten(entry.path for entry in inside)})"
        )
    return tuple(found)


def local_name(path: str) -> Path:
    """A path of a repository as a relative path that stays below its folder, on every system.

    Raises:
        MalformedFile: an absolute path, a drive, `..`, a device of Windows, control characters.
    """
    for part in path.split("/"):
        if (
            not plain_name(part)
            or _DEVICES.fullmatch(part)
            or _CONTROL.search(part)
            or part != part.rstrip(" .")
        ):
            raise MalformedFile(
                f"the repository has a file named {path!r:.200}, which is no safe file name; "
                "leave it out with --exclude"
            )
    return Path(*path.split("/"))


def _any_fits(path: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(path, one + "*" if one.endswith("/") else one) for one in patterns
    )
