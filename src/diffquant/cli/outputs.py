"""Which files `-t A -t B` writes: names for several outputs, from a folder or a template."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffquant.convert.output_names import published_name
from diffquant.core.errors import UsageError
from diffquant.quant.type_sets import types_of_set
from diffquant.quant.types import QuantType, type_named

__all__ = ["PLACE", "check_several", "folder_made", "named_outputs", "types_from"]

PLACE = "{type}"
_CONTAINERS = {".gguf": "gguf", ".safetensors": "safetensors"}


def types_from(names: Sequence[str], sets: Sequence[str]) -> tuple[QuantType, ...]:
    """The types of -t and --set, in the order given.

    Raises:
        UsageError: a type comes twice.
        UnknownFormat: no such type or set.
    """
    found: dict[str, str] = {}
    kinds = []
    given = [(type_named(name), f"-t {name}") for name in names]
    given += [(kind, f"--set {name}") for name in sets for kind in types_of_set(name)]
    for kind, option in given:
        if kind.name in found:
            where = found[kind.name]
            both = where if where == option else f"{where} and {option}"
            raise UsageError(f"type {kind.name} is asked for twice ({both}); give it once")
        found[kind.name] = option
        kinds.append(kind)
    return tuple(kinds)


def check_several(**single: object) -> None:
    """Refuse what makes sense for one output only.

    Raises:
        UsageError: says which option.
    """
    for name, value in single.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is for one output: give one type, or run without it")


def named_outputs(output: str | None, stem: str, kinds: Sequence[QuantType]) -> tuple[Path, ...]:
    """A path for each of several types.

    Args:
        output: as given with -o: a folder, or a name with {type}; None is the current folder.
        stem: what names begin with in a folder.
        kinds: the types.

    Raises:
        UsageError: one name for several files.
    """
    if output is not None and PLACE in output:
        upper = _CONTAINERS.get(Path(output).suffix.lower()) == "gguf"
        names = [kind.name.upper() if upper else kind.name for kind in kinds]
        return tuple(Path(output.replace(PLACE, name)) for name in names)
    if output is not None and not _is_folder(output):
        raise UsageError(
            f"{output}: {len(kinds)} types make {len(kinds)} files; give -o a folder (with a slash "
            f"at its end: {Path(output).with_suffix('')}/), or a name with {PLACE} in it"
        )
    folder = Path(output or "")
    return tuple(folder / published_name(stem, kind) for kind in kinds)


def _is_folder(output: str) -> bool:
    """Whether -o names a folder to put files into."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


@contextlib.contextmanager
def folder_made(output: str | None, *, dry_run: bool) -> Iterator[None]:
    """Make the folder that -o names with a slash at its end; one that stays empty is removed.

    Raises:
        UsageError: its own folder does not exist.
    """
    folder = Path(output) if output is not None and PLACE not in output else None
    if folder is None or dry_run or folder.exists():
        yield
        return
    if not folder.parent.is_dir():
        raise UsageError(f"{folder}: folder {folder.parent} does not exist, create it first")
    folder.mkdir()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds the outputs
            folder.rmdir()
