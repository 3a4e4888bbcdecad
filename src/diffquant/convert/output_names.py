"""How an output is named: by its source, its type and its container.

Names follow what is published: `flux1-dev-Q4_K_S.gguf` (city96, QuantStack; the Hub reads the type
off the upper-cased name, huggingface/huggingface.js packages/tasks/src/gguf.ts) and
`flux1-dev_fp8_scaled.safetensors` (Comfy-Org).
"""

from __future__ import annotations

from dataclasses import dataclass

from diffquant.quant.types import QuantType

__all__ = ["file_name", "output_name"]


@dataclass(frozen=True, slots=True)
class _Style:
    """How a container's files carry their type."""

    name: str
    upper: bool


_STYLES = {
    "gguf": _Style("{stem}-{kind}.gguf", upper=True),
    "safetensors": _Style("{stem}_{kind}.safetensors", upper=False),
    "folder": _Style("{stem}-{kind}", upper=False),
}


def file_name(container: str, stem: str, label: str) -> str:
    """Name of a file or folder whose numbers are labelled so."""
    return _STYLES[container].name.format(stem=stem, kind=label)


def output_name(stem: str, kind: QuantType, container: str = "") -> str:
    """The file or folder name of `kind`; in its first container where none is asked for."""
    container = container or next(iter(kind.dialects))
    upper = _STYLES[container].upper
    return file_name(container, stem, kind.name.upper() if upper else kind.name)
