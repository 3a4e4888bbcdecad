"""GGUF header keys: what loaders and the Hub read, and our own.

Keys: gguf-py 0.19.0 gguf/constants.py `Keys.General`; what ComfyUI-GGUF demands of
`general.architecture`: city96/ComfyUI-GGUF@795e451:loader.py:12,77-91. Recipe in docs/formats.md.
"""

from __future__ import annotations

from typing import Any

from diffquant.convert.detect import Match
from diffquant.convert.plan import Plan
from diffquant.core.tensors import TensorSource

__all__ = ["gguf_metadata"]

_QUANTIZATION_VERSION = 2
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}


def gguf_metadata(
    plan: Plan, match: Match, source: TensorSource, ours: dict[str, str]
) -> dict[str, Any]:
    """Metadata of a GGUF output, `general.architecture` first; integers become UINT32."""
    kind = plan.request.type
    file_type = kind.file_type if kind is not None else _FILE_TYPES.get(plan.request.dtype or "")
    out: dict[str, Any] = {
        "general.architecture": plan.gguf_architecture,
        "general.type": "model",
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    if file_type is not None:
        out["general.file_type"] = file_type
    out["general.name"] = source.path.stem if source.path.is_file() else source.path.name
    if match.variant:
        out["general.finetune"] = match.variant
    out.update(ours)
    return out
