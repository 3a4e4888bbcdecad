"""Rounding that asks what an error costs: scale search and error feedback, in stored formats."""

from __future__ import annotations

__all__: list[str] = []
