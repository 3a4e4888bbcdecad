"""How long work reports itself: a protocol, and the silent default. The cli draws it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NO_PROGRESS", "Progress"]


class Progress(Protocol):
    """Called from worker threads; must be cheap and thread-safe."""

    def start(self, label: str, total: int, unit: str = "B") -> None:
        """Begin a phase of `total` units (bytes when `unit` is "B")."""
        ...

    def advance(self, amount: int, key: str = "") -> None:
        """Report `amount` more units done; `key` is what is being worked on."""
        ...

    def stop(self) -> None:
        """End the phase."""
        ...


class _Silent:
    def start(self, label: str, total: int, unit: str = "B") -> None:
        """Ignore the phase."""

    def advance(self, amount: int, key: str = "") -> None:
        """Ignore the advance."""

    def stop(self) -> None:
        """Ignore the end."""


NO_PROGRESS: Progress = _Silent()
