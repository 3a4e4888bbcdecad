"""Rows of FORMATS, a file per family; quant/formats.py puts them together."""

from __future__ import annotations

__all__: list[str] = []
