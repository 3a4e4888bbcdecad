"""bind(): fold the physical tensors of a source into logical ones, dialect by dialect.

Recognised: plain dtypes, ggml blocks, `comfy.gguf.orig_shape.*` of tensors stored as rows of 256,
`comfy_quant` layers and `_quantization_metadata`, the legacy `scaled_fp8` marker, bitsandbytes,
SDNQ folders, Black Forest Labs' own files, ModelOpt's.
"""

from __future__ import annotations

from dataclasses import replace

from diffquant.convert.dialects.bfl_read import bfl_finder, modelopt_finder
from diffquant.convert.dialects.bnb_read import bnb_finder
from diffquant.convert.dialects.comfy_read import comfy_finder
from diffquant.convert.dialects.plain_read import plain_finder
from diffquant.convert.dialects.scaled_read import scaled_finder
from diffquant.convert.dialects.sdnq_read import sdnq_finder
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.core.errors import shorten
from diffquant.core.tensors import TensorSource

__all__ = ["bind"]

# The first that knows a tensor has it: what a marker says goes before what a dtype suggests, and
# the last knows every tensor.
_FINDERS = (
    modelopt_finder,
    comfy_finder,
    bnb_finder,
    sdnq_finder,
    bfl_finder,
    scaled_finder,
    plain_finder,
)


def bind(source: TensorSource) -> LogicalSource:
    """Fold a source's physical tensors into logical ones; reads marker tensors of at most 4 KiB.

    Raises:
        MalformedFile: a marker contradicts the tensors beside it.
    """
    names = {key.rpartition(".")[2] for key in source.specs}
    made = [make(source, names) for make in _FINDERS]
    consumed = {key for finder in made for key in finder.consumed}
    warnings = [line for finder in made for line in finder.warnings]
    finders = [(finder.find, finder.dialect) for finder in made if finder.find is not None]
    tensors: dict[str, LogicalTensor] = {}
    aside: dict[str, str] = {}
    for key, spec in source.specs.items():
        bound, dialect = next(
            (found, name) for find, name in finders if (found := find(spec)) is not None
        )
        if dialect == "plain":
            tensors[key] = bound.tensor
            continue
        tensors[key] = replace(bound.tensor, dialect=dialect)
        consumed.update(bound.used)
        warnings += bound.warnings
        aside.update(bound.set_aside)
    folded = {key: tensor for key, tensor in tensors.items() if key not in consumed}
    used = tuple(key for key in source.specs if key in consumed)
    return LogicalSource(source, folded, used, _together(warnings), aside)


def _together(warnings: list[str]) -> tuple[str, ...]:
    """One line for what is wrong with many layers in the same way."""
    keys: dict[str, list[str]] = {}
    for line in warnings:
        key, _, text = line.partition(": ")
        keys.setdefault(text or key, []).extend([key] if text else [])
    return tuple(_line(text, of) for text, of in keys.items())


def _line(text: str, keys: list[str]) -> str:
    if not keys:
        return text
    who = keys[0] if len(keys) == 1 else f"{len(keys)} layers ({shorten(keys, 2)})"
    return f"{who}: {text}"
