"""What a published file is called, so that the Hub lists it under the type that it holds.

`flux1-dev-Q4_K_S.gguf` (city96, QuantStack) and `flux1-dev_fp8_scaled.safetensors` (Comfy-Org). The
Hub reads a GGUF file's type off its name alone, and of several labels the last counts
(io/quant_label.py): `x-Q4_K_S-F16te.gguf` is listed as F16. A name that reads as meant is kept, one
that does not gets the label at its end; where the type is not known either, the name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from diffquant.core.errors import UsageError
from diffquant.io.quant_label import quant_label
from diffquant.quant.types import TYPES

__all__ = ["PublishedName", "base_name", "published_name", "type_of_header"]

_WORD_END = r"(?![a-z0-9])"
_SEPARATORS = "-_. "
_UNLISTED = "the Hub lists no such type, the file has no row in its table of types"


@dataclass(frozen=True, slots=True)
class PublishedName:
    """A file's name in the repository.

    Attributes:
        name: without folders.
        label: under which the Hub lists it, "" where it does not.
        note: what was changed about the name, or is odd about it; "" for nothing.
    """

    name: str
    label: str
    note: str = ""


def base_name(text: str) -> str:
    """What a header calls its source, without folders: it is anybody's text, and is published."""
    return text.replace("\\", "/").rpartition("/")[2]


def type_of_header(metadata: Mapping[str, str], largest: str) -> str:
    """TYPES name of a file, "" where nothing says it.

    Args:
        metadata: of the header, as text.
        largest: FORMATS name that most weights are stored in.
    """
    named = metadata.get("diffquant.type", "")
    if named in TYPES:
        return named
    number = metadata.get("general.file_type", "")
    if number:
        found = [one.name for one in TYPES.values() if str(one.file_type) == number]
        return found[0] if found and largest in TYPES[found[0]].formats else ""
    return ""


def published_name(
    file: PurePath,
    *,
    kind: str,
    largest: str,
    container: str,
    stem: str = "",
    claimed: str = "",
) -> PublishedName:
    """Name a file for the repository.

    Args:
        file: as it is called here.
        kind: TYPES name, "" where unknown.
        largest: FORMATS name that most weights are stored in, for files of unknown type.
        container: "gguf" or "safetensors".
        stem: what the name shall begin with in place of the file's own stem.
        claimed: the type in its header, where the file is not that throughout.

    Raises:
        UsageError: the Hub would list the file as a type that it is not.
    """
    if container != "gguf":
        return _safetensors(file, kind, stem)
    if not kind:
        return _foreign(file, largest, claimed, stem)
    wanted = kind.upper()
    listed = quant_label(f"a-{wanted}.gguf") == wanted
    name = f"{stem}-{wanted}.gguf" if stem else file.name
    if listed and quant_label(name) == wanted:
        return PublishedName(name, wanted)
    if not listed and not quant_label(name) and _has_word(name, kind):
        return PublishedName(name, "", f"{name}: {_UNLISTED}")
    own = _without(PurePath(name).stem, kind)
    changed = f"{own}-{wanted}.gguf" if own else f"model-{wanted}.gguf"
    label = quant_label(changed)
    if label != (wanted if listed else ""):
        raise UsageError(
            f"{file}: holds {kind}, and the Hub would list {changed} as {label or 'nothing'}; give "
            "another stem with --name"
        )
    was = quant_label(name)
    why = f"the Hub would list it as {was}" if was else "the Hub finds no type in that name"
    if not listed:
        why = f"its name shall say {wanted}; {_UNLISTED}"
    return PublishedName(changed, label, f"{name} becomes {changed}: {why}")


def _safetensors(file: PurePath, kind: str, stem: str) -> PublishedName:
    name = file.name
    if kind and (stem or not _has_word(name, kind)):
        own = stem or _without(PurePath(name).stem, kind)
        name = f"{own}_{kind}.safetensors"
    label = kind.upper() if kind else quant_label(name)
    if name == file.name or stem:
        return PublishedName(name, label)
    return PublishedName(name, label, f"{file.name} becomes {name}: its name shall say its type")


def _foreign(file: PurePath, largest: str, claimed: str, stem: str) -> PublishedName:
    """A GGUF file of no type that we know: its name has to agree with what it holds."""
    label, family = quant_label(file.name), largest.upper()
    held = bool(label) and label.removeprefix("UD-").startswith(family)
    listed = any(quant_label(f"a-{family}{size}.gguf") for size in ("", "_S", "_M"))
    if held or (not label and not listed):
        name = f"{stem}-{label or family}.gguf" if stem else file.name
        if quant_label(name) != label:
            raise UsageError(
                f"{file}: the Hub would list {name} as {quant_label(name) or 'nothing'}; give "
                "another stem with --name"
            )
        return PublishedName(name, label, "" if held else f"{name}: {_UNLISTED}")
    header = f"its recipe is not that of {claimed}" if claimed else "its header names no type"
    raise UsageError(
        f"{file}: most weights are stored as {largest}, {header}, and the Hub would "
        f"list the file as {label or 'nothing'}; rename it, the label of a {family} type last"
    )


def _has_word(name: str, kind: str) -> bool:
    return _word(kind).search(name) is not None


def _word(kind: str) -> re.Pattern[str]:
    """The type as a word of a name, in any case, hyphens for underscores too."""
    text = re.escape(kind).replace("_", "[_-]")
    return re.compile(rf"(?<![A-Za-z0-9]){text}{_WORD_END}", re.IGNORECASE)


def _without(stem: str, kind: str) -> str:
    """A stem without its words for the type, nor the separators before them."""
    text = re.escape(kind).replace("_", "[_-]")
    pattern = rf"(^|[{re.escape(_SEPARATORS)}]+){text}{_WORD_END}"
    return re.sub(pattern, "", stem, flags=re.IGNORECASE).strip(_SEPARATORS)
