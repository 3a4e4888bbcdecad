"""SourceView: what sources that look at another source have in common.

Such a view (parts of several files, a difference added, rows kept for a second reader) has the
surroundings of what it looks at; it opens nothing, so it closes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from diffquant.core.tensors import TensorSource

__all__ = ["SourceView"]


class SourceView:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
