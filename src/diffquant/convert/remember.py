"""Where the sources of our outputs are on this machine: the file holds a fingerprint, never a path.

A small JSON file in the user's cache folder maps fingerprints to paths. It is a convenience:
losing it costs a `--base` on the next command, so a damaged or unwritable cache is reported in the
log only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

__all__ = ["cache_folder", "recall", "remember"]

_log = logging.getLogger(__name__)
_LIMIT = 2000


def cache_folder() -> Path:
    """The user's cache folder for diffquant; DIFFQUANT_CACHE overrides it."""
    if chosen := os.environ.get("DIFFQUANT_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "diffquant"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffquant"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffquant"


def _load(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def remember(fingerprint: str, path: Path) -> None:
    """Note where the source with this fingerprint is."""
    file = cache_folder() / "sources.json"
    try:
        known = _load(file)
        known.pop(fingerprint, None)
        known[fingerprint] = str(path.resolve())
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(dict(list(known.items())[-_LIMIT:]), indent=1))
        partial.replace(file)
    except OSError as error:
        _log.info("cannot remember the source of this output: %s", error)


def recall(fingerprint: str) -> Path | None:
    """Return where a source was seen, if it is still there."""
    path = _load(cache_folder() / "sources.json").get(fingerprint)
    return Path(path) if path and Path(path).exists() else None
