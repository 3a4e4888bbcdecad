"""SourceView: what sources that look at another source have in common.

Such a view (parts of several files, a difference added, rows kept for a second reader) has the
surroundings of what it looks at; it opens nothing, so it closes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffquant.core.tensors import Closing, TensorSource

__all__ = ["SourceView"]


class SourceView(Closing):
    """A TensorSource's path, header and side files; `specs`, `nbytes` and `read` are the view's."""

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self.container = source.container
        self.metadata: Mapping[str, Any] = source.metadata
        self.configs: Mapping[str, Any] = source.configs
        self.files: tuple[str, ...] = getattr(source, "files", ())
        self.components: Mapping[str, Any] = getattr(source, "components", {})
        self._source = source

    def read_file(self, name: str) -> bytes:
        """Return the bytes of one of `files`, which are the source's own."""
        found: bytes = self._source.read_file(name)  # type: ignore[attr-defined]
        return found

    def close(self) -> None:
        """Nothing: whoever opened the source closes it."""
