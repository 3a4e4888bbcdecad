"""Header pairs that go from a source to an output: `modelspec.*`, `ss_*`, and what nobody knows.

safetensors headers hold text, GGUF headers typed values; a folder has a header per component. Text
goes everywhere, under its own key. What has no place is named, and what would be false of the
output is left out: how the source was encoded, what we say ourselves, hashes of other bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffquant.core.tensors import TensorSource

__all__ = ["DESCRIBES_ENCODING", "Carried", "carried"]

# Header keys that say how the source itself was encoded: they are false of anything else.
DESCRIBES_ENCODING = (
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "comfy.gguf.orig_shape.",
    "quantize.imatrix.",
    "split.",
    "_quantization_metadata",
    "quantization_config",
)
_OURS = ("diffquant.", "general.architecture", "general.type")
# Hashes of the tensors' bytes: Stability ModelSpec 1.0.1; kohya-ss/sd-scripts@6edbe00:
# library/train_util.py precalculate_safetensors_hashes.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_TOKENIZERS = "tokenizer."  # a GGUF reader would take a model for a text encoder
# ggml-org/ggml@01f0d4d:docs/gguf.md gguf_metadata_kv_t; llama.cpp's own keys have hyphens as well.
_GGUF_KEY = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_MAX_KEY_NBYTES = 65535


@dataclass(frozen=True, slots=True)
class Carried:
    """What becomes of a source's header pairs.

    Attributes:
        pairs: key -> text for the output's header.
        lost: keys without a place there.
        false: keys that would not be true of it.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)


def carried(source: TensorSource, container: str) -> Carried:
    """Sort a source's header pairs for an output; GGUF to GGUF keeps its types elsewhere."""
    gguf, found = container == "gguf", Carried()
    if gguf and source.container == "gguf":
        return found
    for name, key, value in _pairs(source):
        if key.startswith((*DESCRIBES_ENCODING, *_OURS)) or (gguf and key == "format"):
            continue
        if key in _HASHES:
            found.false.append(name)
        elif not isinstance(value, str) or (gguf and not _fits_gguf(key)):
            found.lost.append(name)
        elif found.pairs.setdefault(key, value) != value:
            found.lost.append(name)  # a component that says something else than one before it
    return found


def _pairs(source: TensorSource) -> Iterator[tuple[str, str, Any]]:
    """(name in the source, key, value); components of a folder have the same keys."""
    folder = source.container == "diffusers_folder"
    for name, value in source.metadata.items():
        component, found, key = name.partition("/")
        inside = folder and found and component in getattr(source, "components", ())
        yield name, key if inside else name, value


def _fits_gguf(key: str) -> bool:
    if len(key) > _MAX_KEY_NBYTES or key.startswith(_TOKENIZERS):
        return False
    return _GGUF_KEY.fullmatch(key) is not None
