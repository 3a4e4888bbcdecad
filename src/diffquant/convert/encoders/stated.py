"""What a text encoder's GGUF header says of its model, by the names of config.json.

The header is right about its own tensors, which a folder that brings the rest may not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from diffquant.convert.encoders.files import ENCODER_FILES

__all__ = ["stated_fields"]


def stated_fields(metadata: Mapping[str, object], kind: str) -> dict[str, int | float]:
    """Numbers in the header of a GGUF file.

    Args:
        metadata: header, by key.
        kind: of the part, as `Component.kind`.

    Returns:
        config.json field -> number; nothing where the header speaks of another architecture.
    """
    row = ENCODER_FILES.get(kind)
    name = metadata.get("general.architecture")
    if row is None or name != row.architecture:
        return {}
    found: dict[str, int | float] = {}
    for field in row.fields:
        value = metadata.get(f"{name}{field.key}" if field.key.startswith(".") else field.key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(field.value, str) and number:
            found[field.value] = cast(float, value)
    return found
