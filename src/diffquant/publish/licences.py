"""Under which license a file may be passed on: what was asked for, else what its source states.

A quantized file inherits the license of what it was made from. Places are asked in this order, and
the card says which one answered:

1. `--license`, with `--license-name` and `--license-link`;
2. the file's own header (`general.license`, `modelspec.license`, `license`), if all files agree;
3. the front matter of a card: `--base-card`, a README.md beside the files, the source's own README
   where this machine remembers the source (convert/remember.py);
4. the card of the base model on the Hub, where the network may be used.

Nothing found is an error: a guess here would be somebody's rights. Keys of front matter:
huggingface/hub-docs modelcard.md (license, license_name, license_link).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.remember import recall
from diffquant.core.errors import MalformedFile, UsageError
from diffquant.publish.facts import FileFacts

__all__ = ["License", "check_license", "front_matter", "license_of"]

_HEADER_KEYS = (
    ("general.license", "general.license.name", "general.license.link"),
    ("modelspec.license", "", ""),
    ("license", "license_name", "license_link"),
)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
# Names of files with a license's text. A card is anybody's, and what it links to is uploaded.
_TEXT = re.compile(r"(?i)[^/\\]*(?:licen[sc]e|copying|notice|terms|policy)[^/\\]*")

_MAX_CARD_NBYTES = 1 << 20
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class License:
    """A license as front matter states it.

    Attributes:
        id: the Hub's identifier, "other" for one that it has no name for.
        name: identifier of such a license, "" for the Hub's own.
        link: URL, or a file of the repository.
        source: which place answered.
        file: the license's text, copied into the repository; None where there is none.
    """

    id: str
    name: str = ""
    link: str = ""
    source: str = ""
    file: Path | None = None


def license_of(
    files: Sequence[FileFacts],
    *,
    asked: License | None,
    cards: Iterable[Path],
    base_models: Sequence[str] = (),
    lookup: Callable[[str], Mapping[str, Any]] | None = None,
) -> License:
    """Find the license.

    Args:
        files: of the release.
        asked: from the command line; wins.
        cards: Markdown files whose front matter may state it, in order.
        base_models: repositories on the Hub.
        lookup: repository -> front matter of its card; None where the network may not be used.

    Raises:
        UsageError: nothing states one, headers disagree, or a license has no link.
    """
    found = asked or _from_headers(files) or _from_cards(cards, files)
    if found is None and lookup is not None:
        for repo in base_models:
            found = found or _from_pairs(lookup(repo), f"card of {repo} on the Hub")
    if found is None:
        raise UsageError(
            "no file, header or card here states a license, and a card without one would be a "
            "guess; give --license ID (such as apache-2.0, or other with --license-name and "
            "--license-link), or --base-card README.md of the original"
        )
    return check_license(found)


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML block at the top of a card; {} where it has none.

    Raises:
        MalformedFile: too large, or no YAML mapping.
    """
    import yaml

    if path.stat().st_size > _MAX_CARD_NBYTES:
        raise MalformedFile(f"a card of {path.stat().st_size} bytes", path=path)
    block = _FRONT.match(path.read_text(encoding="utf-8", errors="replace"))
    if block is None:
        return {}
    try:
        found = yaml.safe_load(block[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MalformedFile(f"its front matter is no YAML: {str(error)[:200]}", path=path) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MalformedFile("its front matter is no YAML mapping", path=path)
    return {str(key): value for key, value in found.items()}


def _from_headers(files: Sequence[FileFacts]) -> License | None:
    found: dict[tuple[str, str, str], str] = {}
    for one in files:
        for keys in _HEADER_KEYS:
            told = tuple(one.header.get(key, "") if key else "" for key in keys)
            if told[0]:
                found.setdefault((told[0], told[1], told[2]), one.path.name)
                break
    if len(found) > 1:
        told_by = "; ".join(f"{name}: {one[0]!r:.80}" for one, name in found.items())
        raise UsageError(f"headers state different licenses ({told_by}); give --license ID")
    for (identifier, name, link), file in found.items():
        pairs = {"license": identifier, "license_name": name, "license_link": link}
        return _from_pairs(pairs, f"header of {file}")
    return None


def _from_cards(cards: Iterable[Path], files: Sequence[FileFacts]) -> License | None:
    places = [*cards]
    for one in files:
        source = recall(one.mark("source.fingerprint"))
        if source is not None:
            places.append((source if source.is_dir() else source.parent) / "README.md")
    for path in dict.fromkeys(places):
        if path.is_file() and (found := _from_pairs(front_matter(path), f"card {path.name}")):
            beside = path.parent / found.link
            if _TEXT.fullmatch(found.link) and beside.is_file():
                return License(found.id, found.name, found.link, found.source, beside)
            return found
    return None


def _from_pairs(pairs: Mapping[str, Any], source: str) -> License | None:
    """A license of front matter; text that is no identifier becomes the name of an `other`."""
    stated = pairs.get("license")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not isinstance(stated, str) or not stated.strip():
        return None
    name, link = (str(pairs.get(key) or "") for key in ("license_name", "license_link"))
    identifier = stated.strip().lower()
    if not _IDENTIFIER.fullmatch(identifier):
        slug = re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-")[:60]
        return License("other", name or slug or "see-link", link, source)
    return License(identifier, name, link, source)


def check_license(found: License) -> License:
    """Return a license that the Hub takes.

    Raises:
        UsageError: no identifier, or `other` without a name and a text.
    """
    if not _IDENTIFIER.fullmatch(found.id):
        raise UsageError(
            f"--license {found.id!r:.80}: expected an identifier of the Hub, such as apache-2.0, "
            "openrail++, or other"
        )
    if found.id == "other" and not (found.name and (found.link or found.file)):
        raise UsageError(
            f"license other ({found.source}) needs --license-name and --license-link, a URL or the "
            "file of its text, which is then put into the repository"
        )
    if found.file is None and found.link and "://" not in found.link:
        raise UsageError(
            f"license_link {found.link!r:.120} ({found.source}) names a file that is not here; "
            "give --license-link with its URL, or the file itself"
        )
    return found
