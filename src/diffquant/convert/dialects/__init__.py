"""Dialects: how an encoded weight is named, packed and scaled in a file.

A format (quant/formats.py) knows numbers, a dialect knows a file. `pack` says which tensors a
dialect writes for one encoded weight; convert/binding.py finds them again, with one finder per
dialect (`*_read.py`).

======= ============================================================================================
plain   `W` holds the numbers; nothing beside it
gguf    `W` holds ggml blocks
comfy   ComfyUI's layers with a marker (comfy.py)
bnb     bitsandbytes' layers with a quant state (bnb.py)
======= ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffquant.convert.dialects.bnb import BNB_FORMATS, pack_bnb
from diffquant.convert.dialects.comfy import COMFY_FORMATS, pack_comfy
from diffquant.convert.dialects.packed import Packed, Shape, plain
from diffquant.core.errors import PolicyError
from diffquant.quant.formats import format_named

__all__ = ["DIALECTS", "Packed", "own_dialect", "pack"]

DIALECTS: Mapping[str, Callable[[str, str, Shape, str], tuple[Packed, ...]]] = {
    "plain": plain,
    "gguf": plain,
    "comfy": pack_comfy,
    "bnb": pack_bnb,
}
# Formats that have parts beside the weight belong to the dialect that names them.
_OWN: Mapping[str, str] = dict.fromkeys(COMFY_FORMATS, "comfy") | dict.fromkeys(BNB_FORMATS, "bnb")

_TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def pack(dialect: str, key: str, fmt: str, shape: Shape, source: str) -> tuple[Packed, ...]:
    """Say what a dialect writes for one encoded weight.

    Args:
        dialect: DIALECTS name.
        key: the weight's full output key.
        fmt: FORMATS name.
        shape: logical shape.
        source: the source's cast format; bitsandbytes records it as the dtype to decode to.

    Raises:
        PolicyError: the dialect cannot hold the format under this key.
    """
    packed = DIALECTS[dialect](key, fmt, shape, _TORCH_NAMES.get(source, "float32"))
    lost = {part.name for part in format_named(fmt).parts} - {one.part for one in packed}
    if lost:  # without them the numbers could not be decoded again
        raise PolicyError(
            f"{key}: the {dialect} dialect has no place for the {' and '.join(sorted(lost))} of "
            f"{fmt}; choose another format or container for it"
        )
    return packed


def own_dialect(fmt: str) -> str:
    """The dialect in which a weight that is already packed is copied."""
    return _OWN.get(fmt, "plain")
