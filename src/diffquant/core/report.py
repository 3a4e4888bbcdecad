"""What a command returns: plain frozen data that turns into JSON without help.

Every result is a frozen dataclass; `to_json` walks it. `envelope` wraps it as `--json` prints it:
one object with schema_version, command, ok, warnings, result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_VERSION", "envelope", "to_json"]

SCHEMA_VERSION = 1


def to_json(value: object) -> Any:  # noqa: ANN401 - JSON is exactly "any of these"
    """Turn frozen data into JSON values; data with a `to_json` of its own decides for itself.

    NaN and infinities become null: JSON has none of them.
    """
    own = getattr(value, "to_json", None)
    if callable(own):
        return own()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Set):
        return sorted(to_json(item) for item in value)
    if isinstance(value, Sequence):
        return [to_json(item) for item in value]
    raise TypeError(f"not report data: {type(value).__name__}")


def envelope(
    command: str, result: object, *, ok: bool = True, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Wrap a result as `--json` prints it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "ok": ok,
        "warnings": list(warnings),
        "result": to_json(result),
    }
