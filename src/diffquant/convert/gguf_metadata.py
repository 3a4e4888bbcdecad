"""GGUF header keys: what loaders and the Hub read, and our own.

Keys: gguf-py 0.19.0 gguf/constants.py `Keys.General`; `quantize.imatrix.*`:
ggml-org/llama.cpp@42ea59b:tools/quantize/quantize.cpp; what ComfyUI-GGUF demands of
`general.architecture`: city96/ComfyUI-GGUF@795e451:loader.py:12,77-91. Recipe in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PureWindowsPath
from typing import Any

from diffquant.convert.carried import DESCRIBES_ENCODING, carried
from diffquant.convert.detect import Match
from diffquant.convert.encoders.files import ENCODER_FILES
from diffquant.convert.logical import ORIG_SHAPE
from diffquant.convert.plan import Plan
from diffquant.convert.targets import TARGETS, Target
from diffquant.core.errors import PolicyError, shorten
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.io.gguf_values import GgufArray, GgufValue

__all__ = ["check_arrays", "gguf_metadata"]

_QUANTIZATION_VERSION = 2
_NAMES = ("general.name", "general.finetune")  # a GGUF source knows its own better than we do
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}


def gguf_metadata(
    plan: Plan,
    match: Match,
    source: TensorSource,
    ours: Mapping[str, str],
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metadata of a GGUF output, `general.architecture` first; integers become UINT32.

    Args:
        plan: what is written.
        match: of the source.
        source: for its name.
        ours: `diffquant.*`.
        model: of a text encoder, its header (encoders/header.py).
    """
    kind = plan.request.type
    file_type = kind.file_type if kind is not None else _FILE_TYPES.get(plan.request.dtype or "")
    out: dict[str, Any] = {
        "general.architecture": plan.gguf_architecture,
        "general.type": ENCODER_FILES[plan.encoder.kind].type if plan.encoder else "model",
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    if file_type is not None:
        out["general.file_type"] = file_type
    out["general.name"] = source.path.stem if source.path.is_file() else source.path.name
    if match.variant:
        out["general.finetune"] = match.variant
    out.update(_imatrix_metadata(plan))
    out.update(model or {})
    out.update(ours)
    for step in plan.steps:
        if step.flat:
            out[ORIG_SHAPE + step.target] = GgufValue("i32", step.assignment.shape)
    out.update(_carried(plan, source, out))
    check_arrays(TARGETS[plan.target], plan.specs, out)
    return out


def check_arrays(
    target: Target, specs: Iterable[TensorSpec], metadata: Mapping[str, object]
) -> None:
    """Refuse array keys beside a tensor of more than four dimensions, where a reader trips on them.

    stable-diffusion.cpp reads such a file with a second parser, which takes an array's items for
    keys (leejet/stable-diffusion.cpp@97d2990:src/gguf_reader_ext.h:114-127).

    Raises:
        PolicyError: names the tensor and the keys.
    """
    if target.arrays_beside_5d:
        return
    deep = next((spec for spec in specs if len(spec.shape) > 4), None)
    arrays = [key for key, value in metadata.items() if _is_array(value)]
    if deep is not None and arrays:
        raise PolicyError(
            f"target {target.name}: {deep.key} has {len(deep.shape)} dimensions, beside which "
            f"array metadata cannot be read: {shorten(arrays)}; use --target comfyui-gguf"
        )


def _is_array(value: object) -> bool:
    inner = value.value if isinstance(value, GgufValue) else value
    return isinstance(inner, GgufArray | list | tuple)


def _imatrix_metadata(plan: Plan) -> dict[str, Any]:
    """What llama-quantize says of the importance matrix it used; names only, never a path."""
    matrix = plan.matrix
    if matrix is None or not plan.importance:
        return {}
    out: dict[str, Any] = {"quantize.imatrix.file": ", ".join(matrix.files)}
    if matrix.datasets:
        names = (PureWindowsPath(one).name for one in matrix.datasets)  # splits at both slashes
        out["quantize.imatrix.dataset"] = ", ".join(names)
    out["quantize.imatrix.entries_count"] = len(matrix.entries)
    if matrix.chunk_count:
        out["quantize.imatrix.chunks_count"] = matrix.chunk_count
    return out


def _carried(plan: Plan, source: TensorSource, out: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of a GGUF source, with their types, as llama-quantize keeps them; text of any other.

    What describes its encoding stays behind when the weights are encoded anew.
    """
    own: Mapping[str, Any] = getattr(source, "typed_metadata", {})
    pairs = own or carried(source, "gguf").pairs
    anew = plan.request.type is not None or plan.request.dtype is not None
    false = ("general.alignment", ORIG_SHAPE, *(DESCRIBES_ENCODING if anew else ()))
    return {
        key: value
        for key, value in pairs.items()
        if key in _NAMES or (key not in out and not key.startswith((*false, "diffquant.")))
    }
