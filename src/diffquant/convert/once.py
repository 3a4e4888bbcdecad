"""A source that reads nothing twice: what several outputs ask of one chunk's rows.

An output that copies asks for the bytes that another one decodes. A chunk's work goes through one
of these, so that whoever comes second gets what was read; it is dropped with the chunk.
"""

from __future__ import annotations

from dataclasses import replace

from diffquant.convert.logical import LogicalSource
from diffquant.convert.view import SourceView
from diffquant.core.tensors import ByteArray, TensorSource

__all__ = ["ReadOnce", "reading_once"]


def reading_once(logical: LogicalSource) -> LogicalSource:
    """The same logical tensors over a source that remembers what it read."""
    return replace(logical, source=ReadOnce(logical.source))


class ReadOnce(SourceView):
    """A TensorSource that keeps every answer; of one thread, and not the owner of its source."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.specs = source.specs
        self.nbytes = source.nbytes
        self._found: dict[tuple[str, tuple[int, int] | None], ByteArray] = {}

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows`, as the source does."""
        span = None if rows == (0, self.specs[key].rows) else rows  # all rows have two spellings
        if (key, span) not in self._found:
            self._found[key, span] = self._source.read(key, rows)
        return self._found[key, span]

    def close(self) -> None:
        """Forget what was read; the source stays open."""
        self._found.clear()
